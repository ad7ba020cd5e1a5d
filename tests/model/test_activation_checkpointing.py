"""Gradient checkpointing, compiled layers and the patch embedding do not change results.

Frozen layers save no tensors for the backward pass.
"""

import pytest
import torch
from helpers.operator_counter import OperatorCounter
from helpers.tiny_models import TINY_LLM, TINY_LLMS, TINY_VITS, randomize_weights
from torch import nn

from internvl.model.activation_checkpointing import (
    SAVED_OPS,
    apply_gradient_checkpointing,
    compile_layers,
    find_transformer_layers,
    get_recomputed_layer_share,
)
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.modeling_intern_vit import PatchEmbedding
from internvl.model.lora import unwrap_peft
from internvl.model.varlen_attention import use_varlen_attention

IMAGE_TOKEN_ID = 7
DOCUMENT_LENGTHS = (9, 15)


def build_model(
    llm: str = "qwen2", vit: dict | None = None, lora: float | None = 0.2, **llm_fields
) -> InternVLChatModel:
    """Build a model with 3 vision layers and 2 LLM layers.

    Args:
        lora: dropout of adapters in both parts, whose base weights are frozen. None: all weights are trainable.
    """
    torch.manual_seed(0)
    vision = TINY_VITS["6B" if llm == "internlm2" else "300M"] | (vit or {})
    llm_config = TINY_LLM | TINY_LLMS[llm] | llm_fields
    config = InternVLChatConfig(vision, llm_config, template="internvl2_5", force_image_size=56)
    model = InternVLChatModel(config)
    model.img_context_token_id = IMAGE_TOKEN_ID
    if lora is not None:
        model.requires_grad_(False)
        model.wrap_backbone_lora(4, 8, lora)
        model.wrap_llm_lora(4, 8, 0.0 if TINY_LLMS[llm].get("num_local_experts") else lora)
    randomize_weights(model, 0.1)
    use_varlen_attention(model.language_model, packed=True)
    return model.train()


def make_batch(lengths: tuple[int, ...] = DOCUMENT_LENGTHS, num_tiles: int = 1) -> dict:
    """Make a packed row with tiles of 4 tokens each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 900, (1, sum(lengths)), generator=generator)
    ids[0, 1 : 1 + 4 * num_tiles] = IMAGE_TOKEN_ID
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    pixels = torch.randn(num_tiles, 3, 56, 56, generator=generator)
    return {"input_ids": ids, "labels": ids, "position_ids": positions, "pixel_values": pixels}


def run_step(model: InternVLChatModel, **inputs) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients; dropout has the same seed each time."""
    model.zero_grad()
    torch.manual_seed(2)
    loss = model(**(inputs or make_batch())).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(actual: tuple, expected: tuple, tolerance: float = 1e-6):
    assert actual[0] == pytest.approx(expected[0], rel=tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            actual[1][name], gradient, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m
        )


# -- gradient checkpointing --------------------------------------------------------------------------------------------

SETTINGS = [(ratio, keep) for ratio in (1, 0.5) for keep in SAVED_OPS]
MODELS = {
    "adapters with dropout": {},
    "InternLM2 and the 6B encoder": {"llm": "internlm2"},
    "experts": {"llm": "gpt_oss", "lora": None},
    "other experts": {"llm": "qwen3_moe", "lora": None},
    "all weights, stochastic depth": {"lora": None, "vit": {"drop_path_rate": 0.3, "dropout": 0.1}},
}


@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing_changes_no_result(kind):
    model = build_model(**MODELS[kind])
    modules = [model.vision_model, model.language_model]
    expected = run_step(model)
    assert expected[1]
    for chosen in ([0], [1], [0, 1]):
        for ratio, keep in SETTINGS if len(chosen) == 2 else SETTINGS[:1]:
            for i, module in enumerate(modules):
                apply_gradient_checkpointing(module, ratio if i in chosen else 0, keep)
            assert_same_step(run_step(model), expected)


@pytest.mark.parametrize("first", [-1, -2])
def test_gradient_checkpointing_after_frozen_layers_changes_no_result(first):
    model = build_model(lora=None, vit={"drop_path_rate": 0.3})
    model.vision_model.requires_grad_(False).encoder.layers[first:].requires_grad_(True)
    expected = run_step(model)
    for ratio, keep in SETTINGS:
        apply_gradient_checkpointing(model.vision_model, ratio, keep)
        assert_same_step(run_step(model), expected)


def test_saved_outputs_are_not_recomputed():
    """Count attention kernels and matrix products of 3 + 2 layers."""
    attention, products = "_scaled_dot_product_flash_attention_for_cpu", "addmm"
    counts = {}
    for ratio, keep in [(0, "none"), *SETTINGS]:
        model = build_model(lora=None, num_key_value_heads=4)  # torch 2.6 has no CPU kernel for fewer heads of keys
        for module in (model.vision_model, model.language_model):
            apply_gradient_checkpointing(module, ratio, keep)
        with OperatorCounter() as counter:
            run_step(model, **make_batch((24,)))
        counts[ratio, keep] = [counter.calls[name] for name in (attention, products)]
    assert {setting: num_kernels for setting, (num_kernels, _) in counts.items()} == {
        (0, "none"): 5,
        (1, "none"): 10,
        (1, "attention"): 5,
        (1, "matmul"): 5,
        (0.5, "none"): 8,  # the first and the third vision layer, the first LLM layer
        (0.5, "attention"): 5,
        (0.5, "matmul"): 5,
    }
    num_products = {setting: number for setting, (_, number) in counts.items()}
    assert num_products[1, "none"] == num_products[1, "attention"]
    assert num_products[1, "none"] > num_products[0.5, "none"] > num_products[0, "none"]
    assert num_products[1, "matmul"] == num_products[0.5, "matmul"] == num_products[0, "none"]


def test_the_last_product_of_a_layer_is_not_recomputed():
    """Count the in-place products of adapted layers.

    There are 4 in each of 3 vision layers, and 7 in each of 2 LLM layers.
    """
    counts = []
    for ratio in (0, 1):
        model = build_model()
        for module in (model.vision_model, model.language_model):
            apply_gradient_checkpointing(module, ratio)
        with OperatorCounter() as counter:
            run_step(model)
        counts.append(counter.calls["addmm_"])
    assert counts[1] - counts[0] == 3 * (4 - 1) + 2 * (7 - 1)


def test_saved_outputs_with_attention_dropout_are_refused():
    model = build_model(vit={"attention_dropout": 0.1})
    apply_gradient_checkpointing(model.vision_model, 1, "none")
    with pytest.raises(
        ValueError, match="--grad_checkpoint_keep matmul is not supported with the attention_dropout of 0.1"
    ):
        apply_gradient_checkpointing(model.vision_model, 1, "matmul")


def test_gradient_checkpointing_of_the_encoder_sets_that_of_its_layers():
    """Upstream's programs and transformers set `encoder.gradient_checkpointing`."""
    vision_model = build_model().vision_model
    encoder = unwrap_peft(vision_model).encoder
    assert not encoder.gradient_checkpointing
    encoder.gradient_checkpointing = True
    assert get_recomputed_layer_share(vision_model) == 1 and encoder.gradient_checkpointing
    apply_gradient_checkpointing(vision_model, 0.5)
    assert get_recomputed_layer_share(vision_model) == pytest.approx(2 / 3) and encoder.gradient_checkpointing
    apply_gradient_checkpointing(vision_model, 0)
    assert not encoder.gradient_checkpointing


# -- frozen layers -----------------------------------------------------------------------------------------------------


def count_saved_tensors(function, *args) -> tuple[torch.Tensor, int]:
    """Return a function's output and its number of saved tensors."""
    count = 0

    def pack(tensor):
        nonlocal count
        count += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(*args), count


@pytest.mark.parametrize("ratio", [0, 1])
def test_a_frozen_vision_encoder_saves_no_tensors(ratio):
    model = build_model(lora=None)
    model.vision_model.requires_grad_(False)
    model.vision_model.enable_input_require_grads()  # as PEFT and transformers do
    apply_gradient_checkpointing(model.vision_model, ratio)
    tiles = make_batch()["pixel_values"]
    features, num_saved = count_saved_tensors(model.extract_feature, tiles)
    assert features.requires_grad and num_saved > 0, "the projector is trainable"
    model.mlp1.requires_grad_(False)
    features, num_saved = count_saved_tensors(model.extract_feature, tiles)
    assert not features.requires_grad and num_saved == 0
    features, num_saved = count_saved_tensors(model.extract_feature, tiles.requires_grad_())
    assert features.requires_grad and num_saved > 0, "pixels require grad"


def list_layers_with_graph(model: InternVLChatModel, module: nn.Module) -> list[bool]:
    """Return for each layer whether its output in a step requires grad."""
    has_graph = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, output: has_graph.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
        for layer in find_transformer_layers(module)
    ]
    model(**make_batch())
    for handle in handles:
        handle.remove()
    return has_graph


def test_layers_before_the_first_trainable_one_have_no_graph():
    model = build_model(lora=None).requires_grad_(False)
    model.vision_model.encoder.layers[-1:].requires_grad_(True)
    apply_gradient_checkpointing(model.vision_model)
    assert list_layers_with_graph(model, model.vision_model) == [False, False, True]
    model = build_model(lora=None).requires_grad_(False)
    model.wrap_backbone_lora(4, 8, layers=[-1, None])
    unwrap_peft(model.vision_model).enable_input_require_grads()
    assert list_layers_with_graph(model, model.vision_model) == [False, False, True]


# -- patch embedding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(56, 56), (28, 70), (60, 45)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_patch_embedding_equals_the_convolution(size, dtype, tolerance):
    torch.manual_seed(0)
    patches = PatchEmbedding(3, 24, 14, 14).to(dtype)
    convolution = nn.Conv2d(3, 24, 14, 14).to(dtype)
    convolution.load_state_dict(patches.state_dict())
    tiles = torch.randn(2, 3, *size).to(dtype)
    results = []
    for module in (patches, convolution):
        inputs = tiles.clone().requires_grad_()
        output = module(inputs)
        (output * torch.linspace(0, 1, output.numel(), dtype=dtype).view(output.shape)).sum().backward()
        results.append([output, inputs.grad, module.weight.grad, module.bias.grad])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=tolerance * expected.abs().max().item(), rtol=tolerance)


# -- compiled layers ---------------------------------------------------------------------------------------------------


# lengths of documents, number of tiles
WARM_UP_ROWS = [(DOCUMENT_LENGTHS, 1), ((11, 20, 5), 2)]
OTHER_ROWS = [((30,), 3), ((8, 9, 10, 11, 12), 4), ((50, 3), 5), ((17,), 1)]


def compile_model(model: InternVLChatModel) -> InternVLChatModel:
    for module in (model.vision_model, model.language_model):
        compile_layers(module)
    return model


@pytest.mark.compile
@pytest.mark.parametrize("llm", ["qwen2", "internlm2"])
def test_compiled_layers_change_no_result(llm):
    """Compare packed rows, with adapters and gradient checkpointing.

    No row is compiled anew after one with a single tile and one with several.
    """
    original, model = build_model(llm, lora=0.0), build_model(llm, lora=0.0)
    names = list(model.state_dict())
    assert list(compile_model(model).state_dict()) == names
    for ratio in (0, 0.5):
        for module in (model.vision_model, model.language_model):
            apply_gradient_checkpointing(module, ratio)
        for row in WARM_UP_ROWS + OTHER_ROWS:
            with torch._dynamo.config.patch(error_on_recompile=row in OTHER_ROWS):
                actual = run_step(model, **make_batch(*row))
            assert_same_step(actual, run_step(original, **make_batch(*row)), 1e-5)


@pytest.mark.compile
def test_compiled_layers_draw_the_same_dropout_in_the_recomputation():
    """In compiled layers, dropout draws other numbers than in eager mode."""
    model = compile_model(build_model())
    expected = run_step(model)
    assert expected[0] != run_step(build_model())[0], "there is dropout"
    for module in (model.vision_model, model.language_model):
        apply_gradient_checkpointing(module)
    assert_same_step(run_step(model), expected)


@pytest.mark.compile
def test_layers_of_many_kinds_are_all_compiled(monkeypatch):
    """Count the compilations of vision layers.

    Some have adapters, and they run with one tile and two, with and without gradients, in training and evaluation.
    """
    graphs, compile_with_inductor = [], nn.Module.compile

    def compile_with_counter(module, dynamic):
        compile_with_inductor(
            module, dynamic=dynamic, backend=lambda graph, inputs: graphs.append(graph) or graph.forward
        )

    monkeypatch.setattr(nn.Module, "compile", compile_with_counter)
    model = build_model(lora=None).requires_grad_(False)
    model.wrap_backbone_lora(4, 8, layers=[-2, None])
    vision_model = compile_model(model).vision_model
    for tiles in (make_batch()["pixel_values"], make_batch(num_tiles=2)["pixel_values"]):
        for is_training in (True, False):
            for needs_grad in (True, False):
                vision_model.train(is_training)
                model.extract_feature(tiles.clone().requires_grad_(needs_grad))
                with torch.no_grad():
                    model.extract_feature(tiles)
    assert len(graphs) > 8, "the limit of torch"
