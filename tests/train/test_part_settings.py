"""LoRA settings and rates of each part: flags, variants, saving, merging, ZeRO."""

from dataclasses import fields

import pytest
import torch
from helpers.training_runs import FREEZE_ALL, read_losses, run_training, train_in_process
from peft import PeftModel
from safetensors.torch import load_file

from internvl.arguments.per_part import LoraArguments, PartRateArguments
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.lora import LORA_RANK_FIELDS, LORA_VARIANTS, PART_FLAGS
from internvl.train.param_groups import build_param_groups

TARGETS = {"vision_model": "attn.qkv", "mlp1": "3", "language_model": "q_proj"}


def adapted_layers(module) -> set[str]:
    """Return the names of the layers with adapters."""
    names = {name.split(".lora_")[0] for name, _ in module.named_parameters() if ".lora_" in name}
    return {name.removeprefix("base_model.model.") for name in names}


# setting -> value, whether an adapted part shows its effect
HAS_EFFECT = {
    "lora_alpha": ("3", lambda module, config, part: config.lora_alpha == 3),
    "lora_dropout": ("0.2", lambda module, config, part: config.lora_dropout == 0.2),
    "lora_targets": (None, lambda module, config, part: all(n.endswith(TARGETS[part]) for n in adapted_layers(module))),
    "lora_layers": ("1:", lambda module, config, part: all(".layers.1." in name for name in adapted_layers(module))),
    "lora_variant": ("dora", lambda module, config, part: config.use_dora),
}


@pytest.mark.parametrize("flag", [field.name for field in fields(LoraArguments)])
def test_lora_flag_affects_its_part_only(build_from_flags, flag):
    part = next(part for part, name in PART_FLAGS.items() if flag.startswith(f"{name}_"))
    setting = flag.removeprefix(f"{PART_FLAGS[part]}_")
    value, has_effect = HAS_EFFECT[setting]
    ranks = [word for field in LORA_RANK_FIELDS.values() for word in (f"--{field}", "2")]
    model, default_model = build_from_flags(*ranks, f"--{flag}", value or TARGETS[part]), build_from_flags(*ranks)
    for name in LORA_RANK_FIELDS:
        module = getattr(model, name)
        assert has_effect(module, module.peft_config["default"], name) == (name == part)
    settings, default_settings = (m.config.lora_settings for m in (model, default_model))
    assert {name for name in LORA_RANK_FIELDS if settings[name] != default_settings[name]} == {part}
    key = setting.removeprefix("lora_")
    assert settings[part][key] != default_settings[part][key]


def test_every_lora_setting_is_tested():
    flags = {field.name for field in fields(LoraArguments)}
    assert flags == {f"{name}_{s}" for name in PART_FLAGS.values() for s in HAS_EFFECT} - {"mlp_lora_layers"}


# flags -> names of parameter groups, learning rates, weight decays
PART_RATES = {
    "none": ([], {("vision encoder", 1e-3, 0.05), ("projector", 1e-3, 0.05), ("LLM", 1e-3, 0.05)}),
    "learning rates": (
        "--backbone_lr 1 --mlp_lr 2 --llm_lr 3".split(),
        {("vision encoder", 1, 0.05), ("projector", 2, 0.05), ("LLM", 3, 0.05)},
    ),
    "weight decays": (
        "--backbone_weight_decay 1 --mlp_weight_decay 2 --llm_weight_decay 0".split(),
        {("vision encoder", 1e-3, 1), ("projector", 1e-3, 2), ("LLM", 1e-3, 0)},
    ),
    "LoRA+": (
        [word for field in LORA_RANK_FIELDS.values() for word in (f"--{field}", "2")]
        + "--backbone_loraplus_lr_ratio 2 --mlp_loraplus_lr_ratio 4 --llm_loraplus_lr_ratio 8".split(),
        {("vision encoder", 1e-3, 0.05), ("projector", 1e-3, 0.05), ("LLM", 1e-3, 0.05)}
        | {("vision encoder", 2e-3, 0.05), ("projector", 4e-3, 0.05), ("LLM", 8e-3, 0.05)},
    ),
    "layer-wise decay": (
        "--backbone_lr 1 --backbone_layer_decay 0.5 --freeze_llm True --freeze_mlp True".split(),
        {("vision encoder", rate, 0.05) for rate in (1, 0.5, 0.25)},  # two layers and the embeddings
    ),
}


@pytest.mark.parametrize(("flags", "expected"), PART_RATES.values(), ids=PART_RATES)
def test_part_rates(build_from_flags, parse_flags, flags, expected):
    model, args = build_from_flags(*flags), parse_flags(*flags)[2]
    groups = build_param_groups(model, args)
    assert {(group["name"], group["lr"], group["weight_decay"]) for group in groups} == expected
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad), "each exactly once"
    if "--backbone_loraplus_lr_ratio" in flags:
        scaled = {id(p) for group in groups if group["lr"] > 1e-3 for p in group["params"]}
        assert scaled == {id(p) for name, p in model.named_parameters() if ".lora_B." in name}
    if "--backbone_lr" in flags:
        assert model.config.training_settings["vision_model"]["lr"] == 1


def test_every_rate_flag_is_tested():
    flags = {word.removeprefix("--") for flags, _ in PART_RATES.values() for word in flags}
    assert {field.name for field in fields(PartRateArguments)} <= flags


LORA_IN_LLM = [*FREEZE_ALL, "--use_llm_lora", "2"]
REFUSED = {
    "setting without adapters": (
        ["--llm_lora_alpha", "4"],
        "--llm_lora_alpha 4.0 requires --use_llm_lora: there are no",
    ),
    "unknown variant": ([*LORA_IN_LLM, "--llm_lora_variant", "dara"], "'dara' is invalid: .* lora, rslora, dora"),
    "dropout 1": ([*LORA_IN_LLM, "--llm_lora_dropout", "1"], "dropout 1.0, .*is invalid"),
    "unknown target": ([*LORA_IN_LLM, "--llm_lora_targets", "q_prj"], "LoRA target 'q_prj' matches no linear layer"),
    "not a range": ([*LORA_IN_LLM, "--llm_lora_layers", "3"], "--llm_lora_layers 3 is invalid: expected START:STOP"),
    "no layers": (
        [*LORA_IN_LLM, "--llm_lora_layers", "9:"],
        r"LoRA in layers \[9, None\] is invalid: this part has 2 layers",
    ),
    "rate of a frozen part": (
        [*LORA_IN_LLM, "--mlp_lr", "1"],
        "--mlp_lr 1.0 has no effect: the projector has no trainable",
    ),
    "LoRA+ without adapters": (
        ["--llm_loraplus_lr_ratio", "4"],
        "--llm_loraplus_lr_ratio 4.0 has no effect: the LLM has no trainable adapters",
    ),
    "decay of frozen layers": (
        [*FREEZE_ALL, "--use_backbone_lora", "2", "--backbone_layer_decay", "0.9"],
        "--backbone_layer_decay 0.9 has no effect: the vision encoder has no trainable parameters besides adapters",
    ),
    "lora_fp32 without bf16": ([*LORA_IN_LLM, "--lora_fp32", "True"], "--lora_fp32 True requires --bf16 True"),
    "lora_fp32 under ZeRO-3": (
        [*LORA_IN_LLM, "--lora_fp32", "True", "--bf16", "True", "--deepspeed", "zero_stage3_config.json"],
        "--lora_fp32 True is not supported under ZeRO-3",
    ),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_without_effect_are_refused(build_from_flags, flags, message):
    with pytest.raises(ValueError, match=message):
        build_from_flags(*flags)


def logits(model: InternVLChatModel) -> torch.Tensor:
    model.img_context_token_id = 7
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(pixels, torch.tensor([[7] * model.num_image_token + [1, 2, 3]])).logits


@pytest.mark.parametrize("variant", LORA_VARIANTS)
def test_variant_starts_at_the_base_model_and_can_be_saved(build_from_flags, tiny_inputs, tmp_path, variant):
    flags = [
        word for name in PART_FLAGS.values() for word in (f"--use_{name}_lora", "4", f"--{name}_lora_variant", variant)
    ]
    model = build_from_flags(*FREEZE_ALL, *flags)
    torch.testing.assert_close(logits(model), logits(InternVLChatModel.from_pretrained(tiny_inputs / "model")))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.05 * torch.randn_like(parameter) * (".lora_" in name)
    model.base_checkpoint = describe_base_checkpoint(tiny_inputs / "model")
    save_adapter_checkpoint(model, tmp_path, gather_trained_tensors(model))

    opened, expected = InternVLChatModel.from_pretrained(tmp_path), logits(model)
    assert opened.config.lora_settings["mlp1"]["variant"] == variant
    torch.testing.assert_close(logits(opened), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(merge_adapters(opened)), expected, atol=1e-4, rtol=1e-4)
    stock = InternVLChatModel.from_pretrained(tiny_inputs / "model")
    for part in LORA_RANK_FIELDS:
        setattr(stock, part, PeftModel.from_pretrained(getattr(stock, part), tmp_path / part))
    torch.testing.assert_close(logits(stock), expected, atol=1e-5, rtol=1e-5)

    model.save_pretrained(tmp_path / "full")
    torch.testing.assert_close(logits(InternVLChatModel.from_pretrained(tmp_path / "full")), expected)


@pytest.mark.multiprocess
def test_variants_train_equally_under_zero_3(tiny_inputs, tmp_path, monkeypatch, caplog):
    """Also, their checkpoint is continued unless the flags ask for other adapters."""
    mix = "--use_backbone_lora 4 --backbone_lora_variant pissa --use_mlp_lora 4 --mlp_lora_variant rslora".split()
    mix += "--use_llm_lora 4 --llm_lora_variant rslora --backbone_lora_dropout 0 --mlp_lora_dropout 0".split()
    flags = [*FREEZE_ALL, *mix, "--llm_lora_dropout", "0", "--max_steps", "3", "--llm_loraplus_lr_ratio", "4"]
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    caplog.set_level("INFO")
    train_in_process(tiny_inputs, tmp_path / "alone", *flags)
    run_training(tiny_inputs, tmp_path / "zero", *flags, "--deepspeed", "zero_stage3_config.json", ranks=2)
    assert read_losses(tmp_path / "zero") == pytest.approx(read_losses(tmp_path / "alone"), abs=1e-5)
    one, other = (logits(InternVLChatModel.from_pretrained(tmp_path / name)) for name in ("alone", "zero"))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    dora = [*LORA_IN_LLM, "--llm_lora_variant", "dora", "--deepspeed", "zero_stage3_config.json"]
    assert (
        "error: DoRA is not supported under ZeRO-3"
        in run_training(tiny_inputs, tmp_path / "dora", *dora, status=1).stderr
    )
    start = ["--model_name_or_path", str(tmp_path / "alone"), *FREEZE_ALL]
    start += [word for field in LORA_RANK_FIELDS.values() for word in (f"--{field}", "4")]
    for more, message in (
        ([], "adapters: continued"),
        (["--llm_lora_variant", "lora"], "adapters: merged before training"),
    ):
        caplog.clear()
        train_in_process(
            tiny_inputs, tmp_path / f"on{len(more)}", *start, *more, "--max_steps", "1", "--learning_rate", "0"
        )
        assert message in caplog.text
        torch.testing.assert_close(
            logits(InternVLChatModel.from_pretrained(tmp_path / f"on{len(more)}")), one, atol=1e-4, rtol=1e-4
        )


@pytest.mark.multiprocess
def test_adapters_are_fp32_in_a_bf16_model(tiny_inputs, tmp_path):
    """Without --lora_fp32 DeepSpeed casts adapters to bf16."""
    flags = [*FREEZE_ALL, "--use_backbone_lora", "4", "--bf16", "True", "--deepspeed", "zero_stage2_config.json"]
    flags += ["--max_steps", "2", "--learning_rate", "1e-6"]
    saved = {}
    for name, more in {"bf16": [], "fp32": ["--lora_fp32", "True"]}.items():
        run_training(tiny_inputs, tmp_path / name, *flags, *more)
        saved[name] = load_file(tmp_path / name / "vision_model/adapter_model.safetensors")
    dtypes = {name: {str(tensor.dtype) for tensor in tensors.values()} for name, tensors in saved.items()}
    assert dtypes == {"bf16": {"torch.bfloat16"}, "fp32": {"torch.float32"}}
    lora_a = [name for name in saved["fp32"] if "lora_A" in name]
    assert any(not torch.equal(saved["fp32"][name], saved["fp32"][name].bfloat16().float()) for name in lora_a)
