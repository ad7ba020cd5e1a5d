"""Trainable parameters, their table, parameter groups and the gradient check."""

import pytest
import torch
from torch import nn

from internvl.arguments.model import ModelArguments
from internvl.arguments.training import TrainingArguments
from internvl.model.internvl_chat import InternVLChatModel
from internvl.train.gradient_check import watch_gradients
from internvl.train.param_groups import build_param_groups
from internvl.train.trainable_parameters import format_trainable_table, set_trainable

ALL_FROZEN = {"freeze_backbone": True, "freeze_llm": True, "freeze_mlp": True}


@pytest.fixture
def model(goldens):
    return InternVLChatModel.from_pretrained(goldens / "models/qwen2")


@pytest.fixture
def args(tmp_path):
    return lambda **flags: TrainingArguments(output_dir=str(tmp_path), **flags)


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# flags, whether the parameter of a name is trainable
TRAINABLE = {
    "all parts": ({}, lambda name: True),
    "frozen vision encoder": ({"freeze_backbone": True}, lambda name: not name.startswith("vision_model")),
    "projector only": ({"freeze_backbone": True, "freeze_llm": True}, lambda name: name.startswith("mlp1")),
    "vision LoRA": (
        ALL_FROZEN | {"use_backbone_lora": 4},
        lambda name: "lora_" in name and name.startswith("vision_model"),
    ),
    "LLM LoRA": (ALL_FROZEN | {"use_llm_lora": 4}, lambda name: "lora_" in name and name.startswith("language_model")),
    "both adapters": (ALL_FROZEN | {"use_backbone_lora": 4, "use_llm_lora": 4}, lambda name: "lora_" in name),
    "both adapters, no freeze flag": (
        {"use_backbone_lora": 4, "use_llm_lora": 4},
        lambda name: "lora_" in name or name.startswith("mlp1"),
    ),
    "last vision layer": (ALL_FROZEN | {"unfreeze_vit_layers": -1}, lambda name: "encoder.layers.2." in name),
    "last two vision layers and adapters": (
        ALL_FROZEN | {"unfreeze_vit_layers": 1, "use_backbone_lora": 4},
        lambda name: (
            name.startswith("vision_model") and ("lora_" in name or ".layers.0." not in name) and (".layers." in name)
        ),
    ),
    "LM head": (ALL_FROZEN | {"unfreeze_lm_head": True}, lambda name: "lm_head" in name),
    "LLM LoRA and LM head": (
        ALL_FROZEN | {"use_llm_lora": 4, "unfreeze_lm_head": True},
        lambda name: "lora_" in name or "lm_head" in name,
    ),
}


@pytest.mark.parametrize(("flags", "is_trainable"), TRAINABLE.values(), ids=TRAINABLE)
def test_trainable_parameters(model, flags, is_trainable):
    set_trainable(model, ModelArguments(**flags))
    assert trainable_names(model)
    assert trainable_names(model) == {name for name, _ in model.named_parameters() if is_trainable(name)}


@pytest.mark.parametrize("name", ["internlm2", "qwen2", "llama", "phi3"])
@pytest.mark.parametrize("rank", [0, 4])
def test_lm_head_is_trainable_and_not_tied(goldens, name, rank):
    """InternLM2 calls the LM head `output`; no chat checkpoint ties it."""
    model = InternVLChatModel.from_pretrained(goldens / "models" / name)
    set_trainable(model, ModelArguments(**ALL_FROZEN, use_llm_lora=rank, unfreeze_lm_head=True))
    head = model.get_output_embeddings().weight
    assert head.requires_grad and not model.get_input_embeddings().weight.requires_grad
    assert [p is head for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n] == [True]


@pytest.mark.parametrize(("selected_state", "unused"), [(-1, {}), (-2, {2}), (1, {1, 2}), (3, {}), (0, {0, 1, 2})])
def test_layers_after_the_selected_hidden_state_are_frozen(model, selected_state, unused):
    """They get no gradient, which DDP would wait for."""
    model.select_layer, model.img_context_token_id = selected_state, 7
    set_trainable(model, ModelArguments(freeze_llm=True))
    layers = model.vision_model.encoder.layers
    assert {i for i, layer in enumerate(layers) if not trainable_names(layer)} == set(unused)
    model(
        pixel_values=torch.randn(1, 3, *[model.config.vision_config.image_size] * 2),
        input_ids=torch.full((1, model.num_image_token), 7),
        labels=torch.full((1, model.num_image_token), 7),
    ).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable_names(model)


def test_lora_ranks_are_recorded_in_the_config(model):
    set_trainable(model, ModelArguments(**ALL_FROZEN, use_backbone_lora=4, use_llm_lora=8))
    assert (model.config.use_backbone_lora, model.config.use_llm_lora) == (4, 8)
    for part, rank in ((model.vision_model, 4), (model.language_model, 8)):
        settings = part.peft_config["default"]
        assert (settings.r, settings.lora_alpha) == (rank, 2 * rank)


def test_adapters_of_a_checkpoint_are_continued(goldens):
    model = InternVLChatModel.from_pretrained(goldens / "models/qwen2_lora")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_trainable(model, ModelArguments(**ALL_FROZEN, use_backbone_lora=4, use_llm_lora=4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all("lora_" in name for name in trainable_names(model))
    with pytest.raises(ValueError, match="already has LoRA adapters of rank 4; merge"):
        set_trainable(model, ModelArguments(**ALL_FROZEN, use_backbone_lora=8))


def test_table_of_trainable_parameters(model, args):
    set_trainable(model, ModelArguments(**ALL_FROZEN, use_backbone_lora=4))
    table = format_trainable_table(model, args(learning_rate=2e-4))
    header, vision, projector, llm = (line.split("  ") for line in table.splitlines())
    assert [cell.strip() for cell in header if cell] == [
        "part", "parameters", "trainable", "share", "LoRA rank", "learning rate",
    ]  # fmt: skip
    cells = [cell.strip() for cell in vision if cell.strip()]
    numbers = [p.numel() for p in model.vision_model.parameters()]
    adapters = sum(p.numel() for p in model.vision_model.parameters() if p.requires_grad)
    assert cells == [
        "vision encoder", f"{sum(numbers):,}", f"{adapters:,}", f"{adapters / sum(numbers):.2%}", "4", "0.0002",
    ]  # fmt: skip
    assert "0.00%" in "".join(projector)
    assert "0.00%" in "".join(llm)


def test_param_groups_have_every_trainable_parameter_once(model, args):
    groups = build_param_groups(model, args())
    assert [group["name"] for group in groups] == ["vision encoder", "projector", "LLM"]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_parameter_without_a_gradient_is_named():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    check_gradients = watch_gradients(model.named_parameters())
    model["used"](torch.ones(2)).sum().backward()
    with pytest.raises(
        ValueError, match=r"2 of 4 trainable parameters got no gradient in the first step: unused.weight, unused.bias"
    ):
        check_gradients()


def test_non_finite_gradient_is_named():
    model = nn.Linear(2, 2, bias=False)
    check_gradients = watch_gradients(model.named_parameters())
    (model(torch.ones(2)).sum() * float("inf")).backward()
    with pytest.raises(
        ValueError, match="1 of 1 trainable parameters got a non-finite gradient in the first step: weight"
    ):
        check_gradients()


def test_finite_gradients_pass_and_hooks_are_removed():
    model = nn.Linear(2, 2)
    check_gradients = watch_gradients(model.named_parameters())
    model(torch.ones(2)).sum().backward()
    check_gradients()
    assert not model.weight._backward_hooks
