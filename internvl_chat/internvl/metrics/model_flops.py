"""FLOPs of a chat model per token, tile and token pair.

They are counted from the model itself: from the shapes of its matrices, and from which parameters are trainable. MFU is
these FLOPs, divided by time and by the device's peak (https://arxiv.org/abs/2204.02311, appendix B).
`planning/sample_cost.py` derives the cost of samples from them. A multiplication and an addition are two FLOPs.
Attention is causal and is counted document by document.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from internvl.model.lora import PART_FLAGS, unwrap_peft

if TYPE_CHECKING:
    from internvl.model.internvl_chat import InternVLChatModel


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a model, by what causes them.

    Attributes:
        per_token: of the LLM without its head and attention scores.
        per_loss_token: of the LLM head, which computes logits of loss tokens only.
        per_tile: of the vision encoder and the projector.
        per_token_pair: of attention scores in the LLM, by the sliding window of its layers; None: no window.
    """

    per_token: float
    per_loss_token: float
    per_tile: float
    per_token_pair: dict[int | None, float]

    def count(self, document_lengths: Sequence[int], num_loss_tokens: int, num_tiles: int) -> float:
        """Count the FLOPs of documents; loss tokens and tiles are totals."""
        return (
            self.per_token * sum(document_lengths)
            + self.per_loss_token * num_loss_tokens
            + self.per_tile * num_tiles
            + self.count_attention(document_lengths)
        )

    def count_attention(self, document_lengths: Sequence[int]) -> float:
        """Count the FLOPs of attention scores in the LLM.

        A causal document of n tokens has n^2 / 2 pairs. With a window w < n it has n w - w^2 / 2.
        """
        return sum(
            flops * sum(n * min(n, window or n) - min(n, window or n) ** 2 / 2 for n in document_lengths)
            for window, flops in self.per_token_pair.items()
        )

    def __add__(self, other: "ModelFlops") -> "ModelFlops":
        return ModelFlops(
            per_token=self.per_token + other.per_token,
            per_loss_token=self.per_loss_token + other.per_loss_token,
            per_tile=self.per_tile + other.per_tile,
            per_token_pair=dict(Counter(self.per_token_pair) + Counter(other.per_token_pair)),
        )


def count_model_flops(model: "InternVLChatModel", backward: bool = True, adapters: bool = True) -> ModelFlops:
    """Count the FLOPs that a model requires.

    They depend on which parameters are trainable at this moment.

    A matrix product costs one unit in the forward pass. In the backward pass it costs another one if its weight is
    trainable, and another one for the gradient of its input if anything before it is trainable.

    Not counted: recomputed activations, elementwise operations (norms, activation functions), work per step (optimizer,
    norms of DoRA), vision layers after `select_layer`, padding. Adapters of experts, which PEFT merges into the
    weights in every forward pass, count as if tokens were multiplied with them.

    Args:
        backward: count forward and backward pass, not only the forward pass.
        adapters: count the products with A and B of the adapters.
    """
    vision, llm = unwrap_peft(model.vision_model), unwrap_peft(model.language_model)
    parts = [getattr(model, name) for name in PART_FLAGS]
    # Layers after `select_layer` have no effect. It is an index into num_hidden_layers + 1 outputs, -1 the last.
    num_vision_layers = model.select_layer % (vision.config.num_hidden_layers + 1)
    first_trainable = min(
        (
            locate_tensor(part_index, name)
            for part_index, part in enumerate(parts)
            for name, parameter in part.named_parameters()
            if parameter.requires_grad
        ),
        default=Position(len(parts), 0, 0, False),
    )

    def count_passes(position: Position, is_trainable: bool = False) -> int:
        has_input_gradient = backward and first_trainable < position
        return 1 + has_input_gradient + (backward and is_trainable)

    def count_attention_passes(part_index: int, layer: int) -> int:
        # Attention scores are products of two activations: where gradients pass, the backward pass has twice the
        # products of the forward pass. The scores are computed right before the output projection, stage 2.
        has_gradient = count_passes(Position(part_index, layer, 2, False)) > 1
        return 3 if has_gradient else 1

    patches_per_token = round(1 / model.downsample_ratio) ** 2  # merged by the pixel shuffle
    num_patches = model.num_image_token * patches_per_token  # per tile
    head_modules = set(llm.get_output_embeddings().modules())
    per_token = per_loss_token = per_tile = 0.0
    for part_index, (name, part) in enumerate(zip(PART_FLAGS, parts, strict=True)):
        for matrix in iterate_matrices(part):
            position = locate_tensor(part_index, matrix.name)
            if "lora_" in matrix.name and not adapters:
                continue
            flops = matrix.flops_per_vector * count_passes(position, matrix.is_trainable)
            if name == "vision_model" and position.layer < num_vision_layers:
                has_class_token = position.layer >= 0  # it is prepended after the patch embedding
                per_tile += flops * (num_patches + has_class_token)
            elif name == "mlp1":
                per_tile += flops * model.num_image_token
            elif name == "language_model" and matrix.module in head_modules:
                per_loss_token += flops
            elif name == "language_model":
                per_token += flops

    # Attention scores of the vision encoder: all pairs of a tile, twice 2 FLOPs per channel (Q K^T and its product
    # with V).
    scores = 4.0 * (num_patches + 1) ** 2 * vision.config.hidden_size
    per_tile += sum(scores * count_attention_passes(0, layer) for layer in range(num_vision_layers))
    per_token_pair = _count_pair_flops(llm.config, lambda layer: count_attention_passes(2, layer))
    return ModelFlops(per_token, per_loss_token, per_tile, per_token_pair)


def _count_pair_flops(config, count_passes_fn: Callable[[int], int]) -> dict[int | None, float]:
    """Count the FLOPs of a token pair over all layers, by window.

    Args:
        count_passes_fn: layer -> how often the FLOPs of a forward pass count.
    """
    num_heads = config.num_attention_heads
    flops = 4.0 * num_heads * (getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"
    layer_types = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    windows = {"full_attention": None, "sliding_attention": window}
    per_pair = Counter()
    for layer, layer_type in enumerate(layer_types):
        if layer_type in windows:
            per_pair[windows[layer_type]] += flops * count_passes_fn(layer)
    return dict(per_pair)


# -- matrices of a model -----------------------------------------------------------------------------------------------


class Position(NamedTuple):
    """Position of a tensor in the order of computation, comparable by `<`.

    Tensors that are used at the same time have the same position: q, k and v, or gate and up.
    """

    part: int  # index in PART_FLAGS
    layer: float  # -1 before the first layer, inf after the last
    stage: int  # in the layer
    is_lora_b: bool  # B of an adapter comes after A


# Stages of a layer by words in the names of its tensors. Norms and everything else are stage 0.
STAGES = {"self_attn": 1, "attention": 1, "attn": 1, "mlp": 3, "feed_forward": 3}
OUTPUT_LAYERS = {"o_proj", "wo", "proj", "down_proj", "w2", "fc2"}  # one stage after the tensors they depend on


def locate_tensor(part: int, name: str) -> Position:
    """Locate a tensor in the order of computation, by its name."""
    words = name.split(".")
    layer = next((float(word) for word in words if word.isdigit()), -1.0 if "emb" in name else math.inf)
    stage = next((STAGES[word] for word in words if word in STAGES), 0)
    return Position(part, layer, stage + bool(OUTPUT_LAYERS.intersection(words)), "lora_B" in words)


class Matrix(NamedTuple):
    """A matrix that vectors are multiplied with."""

    module: nn.Module
    name: str
    flops_per_vector: float
    is_trainable: bool


NUM_EXPERTS_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")  # of the configurations of MoE models


def iterate_matrices(part: nn.Module) -> Iterator[Matrix]:
    """Iterate over the matrices of a part of the model.

    FLOPs of experts are multiplied by the share of experts that a token is routed to.
    """
    config = getattr(unwrap_peft(part), "config", None)
    num_experts = next((n for field in NUM_EXPERTS_FIELDS if (n := getattr(config, field, None))), 1)
    expert_share = getattr(config, "num_experts_per_tok", 1) / num_experts if num_experts > 1 else 1
    for name, module in part.named_modules():
        is_expert = ".experts" in name
        share = expert_share if is_expert else 1
        if isinstance(module, nn.Linear):
            # Not from the weight, which has another shape if it is quantized or partitioned (ZeRO-3).
            size = module.in_features * module.out_features
            yield Matrix(module, name, 2.0 * size * share, module.weight.requires_grad)
        elif not isinstance(module, nn.Embedding):
            for key, weight in module.named_parameters(recurse=False):
                shape = getattr(weight, "ds_shape", weight.shape)  # ds_shape: the full shape under ZeRO-3
                num_dims = 3 if is_expert else 2  # transformers stacks the matrices of all experts
                if len(shape) == num_dims or isinstance(module, nn.Conv2d) and key == "weight":
                    yield Matrix(module, f"{name}.{key}", 2.0 * math.prod(shape) * share, weight.requires_grad)
