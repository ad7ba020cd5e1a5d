"""What trains, for each mix of flags; the printed table; the check on gradients."""

import pytest
import torch
from torch import nn

from internvl.arguments.training import ModelArguments, TrainingArguments
from internvl.model.internvl_chat import InternVLChatModel
from internvl.train.gradient_check import watch_gradients
from internvl.train.param_groups import build_param_groups
from internvl.train.trainable_parameters import set_trainable, trainable_table

FROZEN = {"freeze_backbone": True, "freeze_llm": True, "freeze_mlp": True}


@pytest.fixture
def model(goldens):
    return InternVLChatModel.from_pretrained(goldens / "models/qwen2")


@pytest.fixture
def args(tmp_path):
    return lambda **flags: TrainingArguments(output_dir=str(tmp_path), **flags)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# flags -> does this name train?
MIXES = {
    "everything": ({}, lambda name: True),
    "frozen encoder": ({"freeze_backbone": True}, lambda name: not name.startswith("vision_model")),
    "projector alone": ({"freeze_backbone": True, "freeze_llm": True}, lambda name: name.startswith("mlp1")),
    "vision LoRA": (
        FROZEN | {"use_backbone_lora": 4},
        lambda name: "lora_" in name and name.startswith("vision_model"),
    ),
    "LLM LoRA": (FROZEN | {"use_llm_lora": 4}, lambda name: "lora_" in name and name.startswith("language_model")),
    "both LoRAs": (FROZEN | {"use_backbone_lora": 4, "use_llm_lora": 4}, lambda name: "lora_" in name),
    "both LoRAs, nothing frozen by flag": (
        {"use_backbone_lora": 4, "use_llm_lora": 4},
        lambda name: "lora_" in name or name.startswith("mlp1"),
    ),
    "the last vision layer": (FROZEN | {"unfreeze_vit_layers": -1}, lambda name: "encoder.layers.2." in name),
    "the last two vision layers behind their adapters": (
        FROZEN | {"unfreeze_vit_layers": 1, "use_backbone_lora": 4},
        lambda name: (
            name.startswith("vision_model") and ("lora_" in name or ".layers.0." not in name) and (".layers." in name)
        ),
    ),
    "the head": (FROZEN | {"unfreeze_lm_head": True}, lambda name: "lm_head" in name),
    "LLM LoRA and the head": (
        FROZEN | {"use_llm_lora": 4, "unfreeze_lm_head": True},
        lambda name: "lora_" in name or "lm_head" in name,
    ),
}


@pytest.mark.parametrize(("flags", "trains"), MIXES.values(), ids=MIXES)
def test_what_trains(model, flags, trains):
    set_trainable(model, ModelArguments(**flags))
    assert trained(model)
    assert trained(model) == {name for name, _ in model.named_parameters() if trains(name)}


@pytest.mark.parametrize("name", ["internlm2", "qwen2", "llama", "phi3"])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_head_trains_by_every_name_and_apart_from_the_embedding(goldens, name, rank):
    """InternLM2 calls it `output`. Head and embedding are stored apart in every chat checkpoint."""
    model = InternVLChatModel.from_pretrained(goldens / "models" / name)
    set_trainable(model, ModelArguments(**FROZEN, use_llm_lora=rank, unfreeze_lm_head=True))
    head = model.get_output_embeddings().weight
    assert head.requires_grad and not model.get_input_embeddings().weight.requires_grad
    assert [p is head for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n] == [True]


@pytest.mark.parametrize(("select", "idle"), [(-1, {}), (-2, {2}), (1, {1, 2}), (3, {}), (0, {0, 1, 2})])
def test_layers_above_the_hidden_state_that_is_read_do_not_train(model, select, idle):
    """They would get no gradient, which DDP waits for."""
    model.select_layer, model.img_context_token_id = select, 7
    set_trainable(model, ModelArguments(freeze_llm=True))
    layers = model.vision_model.encoder.layers
    assert {i for i, layer in enumerate(layers) if not trained(layer)} == set(idle)
    model(
        pixel_values=torch.randn(1, 3, *[model.config.vision_config.image_size] * 2),
        input_ids=torch.full((1, model.num_image_token), 7),
        labels=torch.full((1, model.num_image_token), 7),
    ).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained(model)


def test_lora_ranks_are_kept_in_the_config(model):
    set_trainable(model, ModelArguments(**FROZEN, use_backbone_lora=4, use_llm_lora=8))
    assert (model.config.use_backbone_lora, model.config.use_llm_lora) == (4, 8)
    for part, rank in ((model.vision_model, 4), (model.language_model, 8)):
        settings = part.peft_config["default"]
        assert (settings.r, settings.lora_alpha) == (rank, 2 * rank)


def test_a_checkpoint_with_adapters_goes_on_with_them(goldens):
    model = InternVLChatModel.from_pretrained(goldens / "models/qwen2_lora")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_trainable(model, ModelArguments(**FROZEN, use_backbone_lora=4, use_llm_lora=4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all("lora_" in name for name in trained(model))
    with pytest.raises(ValueError, match="already has LoRA adapters of rank 4; merge"):
        set_trainable(model, ModelArguments(**FROZEN, use_backbone_lora=8))


def test_the_table_adds_up(model, args):
    set_trainable(model, ModelArguments(**FROZEN, use_backbone_lora=4))
    table = trainable_table(model, args(learning_rate=2e-4))
    head, vision, projector, llm = (line.split("  ") for line in table.splitlines())
    assert [cell.strip() for cell in head if cell] == [
        "part", "parameters", "trained", "share", "LoRA rank", "learning rate",
    ]  # fmt: skip
    cells = [cell.strip() for cell in vision if cell.strip()]
    numbers = [p.numel() for p in model.vision_model.parameters()]
    adapters = sum(p.numel() for p in model.vision_model.parameters() if p.requires_grad)
    assert cells == [
        "vision encoder", f"{sum(numbers):,}", f"{adapters:,}", f"{adapters / sum(numbers):.2%}", "4", "0.0002",
    ]  # fmt: skip
    assert "0.00%" in "".join(projector)
    assert "0.00%" in "".join(llm)


def test_optimizer_groups_hold_every_trained_tensor_once(model, args):
    groups = build_param_groups(model, args())
    assert [group["name"] for group in groups] == ["vision encoder", "projector", "language model"]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_tensor_without_a_gradient_is_named():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    check = watch_gradients(model.named_parameters())
    model["used"](torch.ones(2)).sum().backward()
    with pytest.raises(ValueError, match=r"2 of 4 trainable tensors got no gradient: unused.weight, unused.bias"):
        check()


def test_a_gradient_that_is_not_finite_is_named():
    model = nn.Linear(2, 2, bias=False)
    check = watch_gradients(model.named_parameters())
    (model(torch.ones(2)).sum() * float("inf")).backward()
    with pytest.raises(ValueError, match="1 of 1 trainable tensors got a gradient that is not finite: weight"):
        check()


def test_good_gradients_pass_and_the_hooks_are_gone():
    model = nn.Linear(2, 2)
    check = watch_gradients(model.named_parameters())
    model(torch.ones(2)).sum().backward()
    check()
    assert not model.weight._backward_hooks
