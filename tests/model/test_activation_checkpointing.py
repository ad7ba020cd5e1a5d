"""How towers run changes no number: checkpoints of every kind, compiled layers, the patch embedding as a product. And
what is frozen keeps nothing for the backward pass."""

from collections import Counter

import pytest
import torch
from helpers.tiny_models import LLM, LLMS, VITS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from internvl.model.activation_checkpointing import (
    SAVED_OPS,
    apply_gradient_checkpointing,
    compile_layers,
    recomputed_layer_share,
    transformer_layers,
)
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.modeling_intern_vit import PatchEmbedding
from internvl.model.lora import unwrap_peft
from internvl.model.varlen_attention import use_varlen_attention

IMAGE = 7
LENGTHS = (9, 15)  # of the documents of the row


def chat(llm: str = "qwen2", vit: dict | None = None, lora: float | None = 0.2) -> InternVLChatModel:
    """Three vision layers, two of the language model; with `lora`, adapters of that dropout in both, else frozen."""
    torch.manual_seed(0)
    vision = VITS["6B" if llm == "internlm2" else "300M"] | (vit or {})
    config = InternVLChatConfig(vision, LLM | LLMS[llm], template="internvl2_5", force_image_size=56)
    model = InternVLChatModel(config)
    model.img_context_token_id = IMAGE
    if lora is not None:
        model.requires_grad_(False)
        model.wrap_backbone_lora(4, 8, lora)
        model.wrap_llm_lora(4, 8, 0.0 if LLMS[llm].get("num_local_experts") else lora)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    use_varlen_attention(model.language_model, packed=True)
    return model.train()


def batch(lengths: tuple[int, ...] = LENGTHS) -> dict:
    """A packed row with one tile."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 900, (1, sum(lengths)), generator=generator)
    ids[0, 1:5] = IMAGE
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    pixels = torch.randn(1, 3, 56, 56, generator=generator)
    return {"input_ids": ids, "labels": ids, "position_ids": positions, "pixel_values": pixels}


def step(model: InternVLChatModel, **inputs) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients; dropout draws from the same seed each time."""
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(**(inputs or batch())).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check(found: tuple, expected: tuple, tolerance: float = 1e-6):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m
        )


# -- checkpoints -------------------------------------------------------------------------------------------------------

WAYS = [(every, keep) for every in (1, 2) for keep in SAVED_OPS]
MODELS = {
    "adapters with dropout": {},
    "InternLM2 and the 6B encoder": {"llm": "internlm2"},
    "experts": {"llm": "gpt_oss", "lora": None},
    "other experts": {"llm": "qwen3_moe", "lora": None},
    "all weights, stochastic depth": {"lora": None, "vit": {"drop_path_rate": 0.3, "dropout": 0.1}},
}


@pytest.mark.parametrize("kind", MODELS)
def test_no_checkpoint_changes_a_number(kind):
    model = chat(**MODELS[kind])
    towers = [model.vision_model, model.language_model]
    expected = step(model)
    assert expected[1]
    for chosen in ([0], [1], [0, 1]):
        for every, keep in WAYS if len(chosen) == 2 else WAYS[:1]:
            for place, tower in enumerate(towers):
                apply_gradient_checkpointing(tower, every if place in chosen else 0, keep)
            check(step(model), expected)


@pytest.mark.parametrize("first", [-1, -2])
def test_no_checkpoint_changes_a_number_above_frozen_layers(first):
    model = chat(lora=None, vit={"drop_path_rate": 0.3})
    model.vision_model.requires_grad_(False).encoder.layers[first:].requires_grad_(True)
    expected = step(model)
    for every, keep in WAYS:
        apply_gradient_checkpointing(model.vision_model, every, keep)
        check(step(model), expected)


class Counted(TorchDispatchMode):
    """Counts the operators that are computed."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def test_what_is_kept_is_not_computed_again():
    """Attention kernels and matrix products of a step, of one document: layers of the towers are 3 and 2."""
    attention, products = "_scaled_dot_product_flash_attention_for_cpu", "addmm"
    found = {}
    for every, keep in [(0, "none"), *WAYS]:
        model = chat(lora=None)
        for tower in (model.vision_model, model.language_model):
            apply_gradient_checkpointing(tower, every, keep)
        with Counted() as counted:
            step(model, **batch((24,)))
        found[every, keep] = [counted.calls[name] for name in (attention, products)]
    kernels = {key: counts[0] for key, counts in found.items()}
    assert kernels == {
        (0, "none"): 5,
        (1, "none"): 10,
        (1, "attention"): 5,
        (1, "matmul"): 5,
        (2, "none"): 8,  # the first and the third vision layer, the first of the language model
        (2, "attention"): 5,
        (2, "matmul"): 5,
    }
    biased = {key: counts[1] for key, counts in found.items()}
    assert biased[1, "none"] == biased[1, "attention"] > biased[2, "none"] > biased[0, "none"]
    assert biased[1, "matmul"] == biased[2, "matmul"] == biased[0, "none"]


def test_the_last_product_of_a_layer_is_not_computed_again():
    """Adapted layers add their large product in place: 4 in each of 3 vision layers, 7 in each of the LLM's 2."""
    found = []
    for every in (0, 1):
        model = chat()
        for tower in (model.vision_model, model.language_model):
            apply_gradient_checkpointing(tower, every)
        with Counted() as counted:
            step(model)
        found.append(counted.calls["addmm_"])
    assert found[1] - found[0] == 3 * (4 - 1) + 2 * (7 - 1)


def test_kept_outputs_of_random_attention_are_refused():
    model = chat(vit={"attention_dropout": 0.1})
    apply_gradient_checkpointing(model.vision_model, 1, "none")
    with pytest.raises(ValueError, match="--checkpoint_keep matmul does not go with the attention_dropout of 0.1"):
        apply_gradient_checkpointing(model.vision_model, 1, "matmul")


def test_the_switch_of_the_encoder_is_that_of_its_layers():
    """As upstream's programs, and transformers, set it."""
    tower = chat().vision_model
    encoder = unwrap_peft(tower).encoder
    assert not encoder.gradient_checkpointing
    encoder.gradient_checkpointing = True
    assert recomputed_layer_share(tower) == 1 and encoder.gradient_checkpointing
    apply_gradient_checkpointing(tower, 2)
    assert recomputed_layer_share(tower) == pytest.approx(2 / 3) and encoder.gradient_checkpointing
    apply_gradient_checkpointing(tower, 0)
    assert not encoder.gradient_checkpointing


# -- frozen ------------------------------------------------------------------------------------------------------------


def kept_by(function, *args) -> tuple[torch.Tensor, int]:
    """What a function returns, and how many tensors it keeps for the backward pass."""
    count = 0

    def pack(tensor):
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(*args), count


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_frozen_tower_keeps_nothing(checkpointed):
    model = chat(lora=None)
    model.vision_model.requires_grad_(False)
    model.vision_model.enable_input_require_grads()  # as PEFT and transformers do
    apply_gradient_checkpointing(model.vision_model, int(checkpointed))
    tiles = batch()["pixel_values"]
    features, kept = kept_by(model.extract_feature, tiles)
    assert features.requires_grad and kept > 0, "the projector trains"
    model.mlp1.requires_grad_(False)
    features, kept = kept_by(model.extract_feature, tiles)
    assert not features.requires_grad and kept == 0
    features, kept = kept_by(model.extract_feature, tiles.requires_grad_())
    assert features.requires_grad and kept > 0, "somebody asks for the gradient of pixels"


def graphs_of(model: InternVLChatModel, tower: nn.Module) -> list[bool]:
    """Whether each layer of a tower makes a graph in a step."""
    found = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, output: found.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
        for layer in transformer_layers(tower)
    ]
    model(**batch())
    for handle in handles:
        handle.remove()
    return found


def test_layers_below_the_first_trained_one_keep_nothing():
    model = chat(lora=None).requires_grad_(False)
    model.vision_model.encoder.layers[-1:].requires_grad_(True)
    apply_gradient_checkpointing(model.vision_model)
    assert graphs_of(model, model.vision_model) == [False, False, True]
    model = chat(lora=None).requires_grad_(False)
    model.wrap_backbone_lora(4, 8, layers=[-1, None])
    unwrap_peft(model.vision_model).enable_input_require_grads()
    assert graphs_of(model, model.vision_model) == [False, False, True]


# -- patch embedding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(56, 56), (28, 70), (60, 45)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_patches_by_a_product_are_those_of_the_convolution(size, dtype, tolerance):
    torch.manual_seed(0)
    patches = PatchEmbedding(3, 24, 14, 14).to(dtype)
    convolution = nn.Conv2d(3, 24, 14, 14).to(dtype)
    convolution.load_state_dict(patches.state_dict())
    tiles = torch.randn(2, 3, *size).to(dtype)
    outputs = []
    for module in (patches, convolution):
        inputs = tiles.clone().requires_grad_()
        found = module(inputs)
        (found * torch.linspace(0, 1, found.numel(), dtype=dtype).view(found.shape)).sum().backward()
        outputs.append([found, inputs.grad, module.weight.grad, module.bias.grad])
    for found, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance * expected.abs().max().item(), rtol=tolerance)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_layers_change_no_number():
    """Packed rows of other lengths, adapters, checkpoints; dropout draws other numbers, but the same ones twice."""
    rows = [batch(lengths) for lengths in (LENGTHS, (11, 20, 5), (30,))]
    original, model = chat(lora=0.0), chat(lora=0.0)
    names = list(model.state_dict())
    for tower in (model.vision_model, model.language_model):
        compile_layers(tower)
    assert list(model.state_dict()) == names
    for every in (0, 2):
        for tower in (model.vision_model, model.language_model):
            apply_gradient_checkpointing(tower, every)
        for row in rows:
            check(step(model, **row), step(original, **row), 1e-5)

    model = chat()
    for tower in (model.vision_model, model.language_model):
        compile_layers(tower)
    expected = step(model)
    assert expected[0] != step(original)[0], "there is dropout"
    for tower in (model.vision_model, model.language_model):
        apply_gradient_checkpointing(tower)
    check(step(model), expected)
