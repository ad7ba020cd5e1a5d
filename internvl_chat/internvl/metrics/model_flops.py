"""FLOPs that a step of a chat model needs, from the model itself: from each matrix, and whether it trains.

What `metered.py` makes MFU of (https://arxiv.org/abs/2204.02311, appendix B). A plan weighs samples by `flops.py`,
which needs a configuration only and counts what is computed again; in a forward pass the two are equal. A
multiplication and an addition are two; attention is counted by document, and is causal.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from internvl.model.lora import PART_FLAGS, unwrap_peft


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs that are necessary for a token, a trained token's logits, a tile, and a pair of tokens that see each other;
    the latter in layers in which a token sees so many before it (None: all of its document)."""

    token: float
    trained: float
    tile: float
    pairs: dict[int | None, float]

    def of(self, documents: Sequence[int], trained: int, tiles: int) -> float:
        """Of documents of so many tokens, of which so many in all are trained, and their tiles."""
        return self.token * sum(documents) + self.trained * trained + self.tile * tiles + self.attention(documents)

    def attention(self, documents: Sequence[int]) -> float:
        """Of the language model's part in it: n tokens are n^2 / 2 pairs, less where a window slides over them."""
        return sum(
            flops * sum(n * min(n, window or n) - min(n, window or n) ** 2 / 2 for n in documents)
            for window, flops in self.pairs.items()
        )

    def __add__(self, other: "ModelFlops") -> "ModelFlops":
        pairs = Counter(self.pairs) + Counter(other.pairs)
        return ModelFlops(*(getattr(self, f) + getattr(other, f) for f in ("token", "trained", "tile")), dict(pairs))


class Place(NamedTuple):
    """Where in the order of computation a tensor is used. What is equal is side by side: q, k and v, or gate and up."""

    part: int
    layer: float
    stage: int
    up: bool  # B of an adapter


STAGES = {"self_attn": 1, "attention": 1, "attn": 1, "mlp": 3, "feed_forward": 3}  # other tensors of a layer: 0
BEHIND = {"o_proj", "wo", "proj", "down_proj", "w2", "fc2"}  # one stage later: what they read, the others have made


def place_of(part: int, name: str) -> Place:
    words = name.split(".")
    layer = next((float(word) for word in words if word.isdigit()), -1.0 if "emb" in name else math.inf)
    stage = next((STAGES[word] for word in words if word in STAGES), 0)
    return Place(part, layer, stage + bool(BEHIND.intersection(words)), "lora_B" in words)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Product(NamedTuple):
    """A matrix that vectors are multiplied with."""

    module: nn.Module
    name: str
    flops: float  # of one vector
    trained: bool


def products(part: nn.Module) -> Iterator[Product]:
    """The matrices of a part; those of experts by the share of them that a token meets."""
    config = getattr(unwrap_peft(part), "config", None)
    experts = next((n for name in EXPERTS if (n := getattr(config, name, None))), 1)
    share = getattr(config, "num_experts_per_tok", 1) / experts if experts > 1 else 1
    for name, module in part.named_modules():
        own = share if ".experts" in name else 1
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features  # also where it is quantized or partitioned
            yield Product(module, name, 2.0 * size * own, module.weight.requires_grad)
        elif not isinstance(module, nn.Embedding):
            for key, weight in module.named_parameters(recurse=False):
                shape = getattr(weight, "ds_shape", weight.shape)
                if len(shape) == (3 if ".experts" in name else 2) or isinstance(module, nn.Conv2d) and key == "weight":
                    yield Product(module, f"{name}.{key}", 2.0 * math.prod(shape) * own, weight.requires_grad)


def model_flops(model: nn.Module, backward: bool = True, adapters: bool = True) -> ModelFlops:
    """What a step of this model needs, as its tensors are frozen or not at this moment.

    Of a backward pass: gradients of weights that train, and of inputs below which something trains. Not counted: what
    is computed again, element by element (norms, activations), or once a step whatever its tokens (the optimizer,
    DoRA's norms); vision layers whose output nobody reads; padding. Adapters of experts, which PEFT multiplies out,
    count as if tokens went through them.

    Args:
        backward: of forward and backward pass, not only forward.
        adapters: with the adapters' own products.
    """
    vision, llm = unwrap_peft(model.vision_model), unwrap_peft(model.language_model)
    parts = {part: getattr(model, part) for part in PART_FLAGS}
    layers = vision.config.num_hidden_layers
    read = model.select_layer % (layers + 1)
    places = [
        place_of(number, name)
        for number, part in enumerate(parts.values())
        for name, parameter in part.named_parameters()
        if parameter.requires_grad
    ]
    lowest = min(places, default=Place(len(parts), 0, 0, False))

    def times(place: Place, trained: bool = False) -> int:
        return 1 + (backward and lowest < place) + (backward and trained)

    merged = round(1 / model.downsample_ratio) ** 2
    patches = model.num_image_token * merged
    head = set(llm.get_output_embeddings().modules())
    flops = dict.fromkeys(("token", "trained", "tile"), 0.0)
    for number, (part, module) in enumerate(parts.items()):
        for product in products(module):
            place = place_of(number, product.name)
            if "lora_" in product.name and not adapters or part == "vision_model" and place.layer >= read:
                continue
            unit = "tile" if part != "language_model" else "trained" if product.module in head else "token"
            vectors = 1
            if part == "mlp1":
                vectors = model.num_image_token
            elif part == "vision_model":
                vectors = patches + (place.layer >= 0)  # the class token comes behind the embeddings
            flops[unit] += product.flops * vectors * times(place, product.trained)

    # A backward pass of attention has twice the products of a forward pass, where anything up to its inputs trains.
    tile = 4.0 * (patches + 1) ** 2 * vision.config.hidden_size
    flops["tile"] += sum(tile * (1 + 2 * (times(Place(0, layer, 2, False)) - 1)) for layer in range(read))
    return ModelFlops(**flops, pairs=_pairs(llm.config, lambda layer: 1 + 2 * (times(Place(2, layer, 2, False)) - 1)))


def _pairs(config, times) -> dict[int | None, float]:
    """FLOPs of a pair of tokens in all layers of a window; `times` a forward pass in each."""
    heads = config.num_attention_heads
    pair = 4.0 * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * (
        config.num_hidden_layers
    )
    windows = {"full_attention": None, "sliding_attention": window}
    pairs = Counter()
    for layer, kind in enumerate(kinds):
        if kind in windows:
            pairs[windows[kind]] += pair * times(layer)
    return dict(pairs)
