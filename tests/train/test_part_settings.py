"""Each part's LoRA settings and rates: flags act, variants begin at nothing and survive saving, merging and ZeRO."""

import json
from dataclasses import fields

import pytest
import torch
from helpers.training_runs import losses, run, run_here
from peft import PeftModel
from safetensors.torch import load_file

from internvl.arguments.per_part import LORA, LoraArguments, RateArguments
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.lora import LORA_RANK_FIELDS, PART_FLAGS, VARIANTS
from internvl.train.param_groups import build_param_groups

FROZEN = "--freeze_backbone True --freeze_llm True --freeze_mlp True".split()
TARGETS = {"vision_model": "attn.qkv", "mlp1": "3", "language_model": "q_proj"}


def adapted(module) -> set[str]:
    """Names of the layers that carry adapters."""
    found = {name.split(".lora_")[0] for name, _ in module.named_parameters() if ".lora_" in name}
    return {name.removeprefix("base_model.model.") for name in found}


# setting -> value, and whether it shows in a wrapped part
SHOWS = {
    "lora_alpha": ("3", lambda module, config, part: config.lora_alpha == 3),
    "lora_dropout": ("0.2", lambda module, config, part: config.lora_dropout == 0.2),
    "lora_targets": (None, lambda module, config, part: all(n.endswith(TARGETS[part]) for n in adapted(module))),
    "lora_layers": ("1:", lambda module, config, part: all(".layers.1." in name for name in adapted(module))),
    "lora_variant": ("dora", lambda module, config, part: config.use_dora),
}


@pytest.mark.parametrize("flag", [field.name for field in fields(LoraArguments)])
def test_lora_flags_act_on_their_part_alone(build, flag):
    part = next(part for part, name in PART_FLAGS.items() if flag.startswith(f"{name}_"))
    setting = flag.removeprefix(f"{PART_FLAGS[part]}_")
    value, shows = SHOWS[setting]
    ranks = [word for field in LORA_RANK_FIELDS.values() for word in (f"--{field}", "2")]
    model, plain = build(*ranks, f"--{flag}", value or TARGETS[part]), build(*ranks)
    for name in LORA_RANK_FIELDS:
        module = getattr(model, name)
        assert shows(module, module.peft_config["default"], name) == (name == part)
    told, usual = (m.config.lora_settings for m in (model, plain))
    assert {name for name in LORA_RANK_FIELDS if told[name] != usual[name]} == {part}
    assert told[part][setting.removeprefix("lora_")] != usual[part][setting.removeprefix("lora_")]


def test_every_setting_is_looked_at():
    assert SHOWS.keys() == LORA.keys()


# flags -> names of groups, learning rates over the whole run's, weight decay
RATES = {
    "none": ([], {("vision encoder", 1e-3, 0.05), ("projector", 1e-3, 0.05), ("language model", 1e-3, 0.05)}),
    "own rates": (
        "--backbone_lr 1 --mlp_lr 2 --llm_lr 3".split(),
        {("vision encoder", 1, 0.05), ("projector", 2, 0.05), ("language model", 3, 0.05)},
    ),
    "own decay": (
        "--backbone_weight_decay 1 --mlp_weight_decay 2 --llm_weight_decay 0".split(),
        {("vision encoder", 1e-3, 1), ("projector", 1e-3, 2), ("language model", 1e-3, 0)},
    ),
    "LoRA+": (
        [word for field in LORA_RANK_FIELDS.values() for word in (f"--{field}", "2")]
        + "--backbone_loraplus_lr_ratio 2 --mlp_loraplus_lr_ratio 4 --llm_loraplus_lr_ratio 8".split(),
        {("vision encoder", 1e-3, 0.05), ("projector", 1e-3, 0.05), ("language model", 1e-3, 0.05)}
        | {("vision encoder", 2e-3, 0.05), ("projector", 4e-3, 0.05), ("language model", 8e-3, 0.05)},
    ),
    "layer by layer": (
        "--backbone_lr 1 --backbone_layer_decay 0.5 --freeze_llm True --freeze_mlp True".split(),
        {("vision encoder", rate, 0.05) for rate in (1, 0.5, 0.25)},  # two layers and the embeddings
    ),
}


@pytest.mark.parametrize(("flags", "expected"), RATES.values(), ids=RATES)
def test_rates(build, parse, flags, expected):
    model, args = build(*flags), parse(*flags)[2]
    groups = build_param_groups(model, args)
    assert {(group["name"], group["lr"], group["weight_decay"]) for group in groups} == expected
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad), "each exactly once"
    if "--backbone_loraplus_lr_ratio" in flags:
        fast = {id(p) for group in groups if group["lr"] > 1e-3 for p in group["params"]}
        assert fast == {id(p) for name, p in model.named_parameters() if ".lora_B." in name}
    if "--backbone_lr" in flags:
        assert model.config.training_settings["vision_model"]["lr"] == 1


def test_every_rate_is_looked_at():
    flags = {word.removeprefix("--") for flags, _ in RATES.values() for word in flags}
    assert {field.name for field in fields(RateArguments)} <= flags


LORA_IN_LLM = [*FROZEN, "--use_llm_lora", "2"]
REFUSED = {
    "a setting without adapters": (["--llm_lora_alpha", "4"], "--llm_lora_alpha 4.0 acts on adapters, which --use_llm"),
    "a variant that is none": ([*LORA_IN_LLM, "--llm_lora_variant", "dara"], "'dara' cannot be: .* lora, rslora, dora"),
    "certain dropout": ([*LORA_IN_LLM, "--llm_lora_dropout", "1"], "dropout 1.0, .*cannot be"),
    "no target": ([*LORA_IN_LLM, "--llm_lora_targets", "q_prj"], "LoRA target 'q_prj' is the end of no linear layer"),
    "no range": ([*LORA_IN_LLM, "--llm_lora_layers", "3"], "--llm_lora_layers 3: not START:STOP"),
    "no layers": ([*LORA_IN_LLM, "--llm_lora_layers", "9:"], r"LoRA in layers \[9, None\]: this part has 2 layers"),
    "a frozen part's rate": ([*LORA_IN_LLM, "--mlp_lr", "1"], "--mlp_lr 1.0 does not act: no weight of the projector"),
    "LoRA+ without": (
        ["--llm_loraplus_lr_ratio", "4"],
        "--llm_loraplus_lr_ratio 4.0 does not act: no adapter of",
    ),
    "layers that are frozen": (
        [*FROZEN, "--use_backbone_lora", "2", "--backbone_layer_decay", "0.9"],
        "--backbone_layer_decay 0.9 does not act: no weight of the vision encoder trains",
    ),
    "fp32 beside fp32": ([*LORA_IN_LLM, "--lora_fp32", "True"], "--lora_fp32 True .* needs --bf16 True"),
    "ZeRO-3 beside fp32": (
        [*LORA_IN_LLM, "--lora_fp32", "True", "--bf16", "True", "--deepspeed", "zero_stage3_config.json"],
        "--lora_fp32 True does not run under ZeRO-3",
    ),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_act_is_refused(build, flags, message):
    with pytest.raises(ValueError, match=message):
        build(*flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("part", ["backbone", "llm"])
def test_4_bits_need_a_gpu(build, part):
    with pytest.raises(ValueError, match=f"--quantize_{part} True needs a CUDA device"):
        build(*FROZEN, f"--use_{part}_lora", "2", f"--quantize_{part}", "True")


@pytest.mark.gpu
def test_4_bits_train_adapters_on_a_base_that_stays(build, tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = build(*LORA_IN_LLM, "--quantize_llm", "True", "--bf16", "True").cuda().train()
    ids = torch.arange(1, 33, device="cuda")[None]
    model(input_ids=ids, labels=ids, position_ids=ids - 1).loss.backward()
    layers = {name: p for name, p in model.language_model.named_parameters() if ".q_proj." in name}
    assert {p.dtype for name, p in layers.items() if "lora_" not in name and name.endswith("weight")} == {torch.uint8}
    assert all(p.grad.isfinite().all() for name, p in layers.items() if "lora_" in name)
    save_adapter_checkpoint(model, tmp_path, gather_trained_tensors(model))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def logits(model: InternVLChatModel) -> torch.Tensor:
    model.img_context_token_id = 7
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(pixels, torch.tensor([[7] * model.num_image_token + [1, 2, 3]])).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_begins_at_nothing_and_ends_in_a_file(build, tiny, tmp_path, variant):
    flags = [
        word for name in PART_FLAGS.values() for word in (f"--use_{name}_lora", "4", f"--{name}_lora_variant", variant)
    ]
    model = build(*FROZEN, *flags)
    torch.testing.assert_close(logits(model), logits(InternVLChatModel.from_pretrained(tiny / "model")))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.05 * torch.randn_like(parameter) * (".lora_" in name)
    model.base_checkpoint = describe_base_checkpoint(tiny / "model")
    save_adapter_checkpoint(model, tmp_path, gather_trained_tensors(model))

    opened, expected = InternVLChatModel.from_pretrained(tmp_path), logits(model)
    assert opened.config.lora_settings["mlp1"]["variant"] == variant
    torch.testing.assert_close(logits(opened), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(merge_adapters(opened)), expected, atol=1e-4, rtol=1e-4)
    stock = InternVLChatModel.from_pretrained(tiny / "model")
    for part in LORA_RANK_FIELDS:
        setattr(stock, part, PeftModel.from_pretrained(getattr(stock, part), tmp_path / part))
    torch.testing.assert_close(logits(stock), expected, atol=1e-5, rtol=1e-5)

    model.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(InternVLChatModel.from_pretrained(tmp_path / "whole")), expected)


def test_variants_train_alike_under_zero_3(tiny, tmp_path, monkeypatch, caplog):
    """And their checkpoint goes on with the same adapters where the flags do not ask for others."""
    mix = "--use_backbone_lora 4 --backbone_lora_variant pissa --use_mlp_lora 4 --mlp_lora_variant rslora".split()
    mix += "--use_llm_lora 4 --llm_lora_variant rslora --backbone_lora_dropout 0 --mlp_lora_dropout 0".split()
    flags = [*FROZEN, *mix, "--llm_lora_dropout", "0", "--max_steps", "3", "--llm_loraplus_lr_ratio", "4"]
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    caplog.set_level("INFO")
    run_here(tiny, tmp_path / "alone", *flags)
    run(tiny, tmp_path / "zero", *flags, "--deepspeed", "zero_stage3_config.json", ranks=2)
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    one, other = (logits(InternVLChatModel.from_pretrained(tmp_path / name)) for name in ("alone", "zero"))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    dora = [*LORA_IN_LLM, "--llm_lora_variant", "dora", "--deepspeed", "zero_stage3_config.json"]
    assert "error: DoRA does not run under ZeRO-3" in run(tiny, tmp_path / "dora", *dora, status=1).stderr
    start = ["--model_name_or_path", str(tmp_path / "alone"), *FROZEN]
    start += [word for field in LORA_RANK_FIELDS.values() for word in (f"--{field}", "4")]
    for more, said in ([], "goes on with"), (["--llm_lora_variant", "lora"], "are merged into"):
        caplog.clear()
        run_here(tiny, tmp_path / f"on{len(more)}", *start, *more, "--max_steps", "1", "--learning_rate", "0")
        assert said in caplog.text
        torch.testing.assert_close(
            logits(InternVLChatModel.from_pretrained(tmp_path / f"on{len(more)}")), one, atol=1e-4, rtol=1e-4
        )


def test_adapters_in_fp32_beside_a_bf16_model(tiny, tmp_path):
    """DeepSpeed casts adapters to bf16 and keeps fp32 copies in its optimizer; with the flag they are fp32."""
    flags = [*FROZEN, "--use_backbone_lora", "4", "--bf16", "True", "--deepspeed", "zero_stage2_config.json"]
    flags += ["--max_steps", "2", "--learning_rate", "1e-6"]
    found = {}
    for name, more in {"bf16": [], "fp32": ["--lora_fp32", "True"]}.items():
        run(tiny, tmp_path / name, *flags, *more)
        found[name] = load_file(tmp_path / name / "vision_model/adapter_model.safetensors")
    kinds = {name: {str(tensor.dtype) for tensor in tensors.values()} for name, tensors in found.items()}
    assert kinds == {"bf16": {"torch.bfloat16"}, "fp32": {"torch.float32"}}
    a = [name for name in found["fp32"] if "lora_A" in name]
    assert any(not torch.equal(found["fp32"][name], found["fp32"][name].bfloat16().float()) for name in a)
