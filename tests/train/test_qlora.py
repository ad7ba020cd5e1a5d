"""QLoRA: adapters are trained over 4-bit weights, and fit the weights that were quantized."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.paths import PACKAGE_DIR
from helpers.training_runs import (
    FREEZE_ALL,
    TRAIN_ADAPTERS,
    ZERO_FLAGS,
    build_run_flags,
    load_weights,
    prepare_batch,
    prepare_trainer,
    read_losses,
    run_training,
)

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import gather_trained_tensors, save_adapter_checkpoint
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.lora import PART_FLAGS
from internvl.tools import merge_lora

QUANTIZED = [*TRAIN_ADAPTERS, *"--quantize_backbone True --quantize_llm True --max_steps 4 --save_steps 2".split()]
WAYS = {"alone": ("none", 1), "2 ranks, ZeRO-2": ("zero2", 2)}


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def qlora_run(request, tiny_inputs, tmp_path_factory):
    """Train adapters over 4-bit weights; return flags, number of ranks and output."""
    zero, ranks = request.param
    output = tmp_path_factory.mktemp("qlora") / "out"
    flags = [*QUANTIZED, *ZERO_FLAGS[zero]]
    run_training(tiny_inputs, output, *flags, ranks=ranks)
    return flags, ranks, output


@pytest.mark.multiprocess
def test_resumed_run_equals_the_unbroken_one(qlora_run, tiny_inputs, tmp_path):
    flags, ranks, output = qlora_run
    shutil.copytree(output / "checkpoint-2", tmp_path / "out/checkpoint-2")
    run_training(tiny_inputs, tmp_path / "out", *flags, ranks=ranks)
    assert read_losses(tmp_path / "out") == read_losses(output)
    resumed, unbroken = load_weights(tmp_path / "out"), load_weights(output)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


@pytest.mark.multiprocess
def test_another_run_continues_the_adapters(qlora_run, tiny_inputs, tmp_path):
    flags, ranks, output = qlora_run
    more = ["--model_name_or_path", str(output), "--learning_rate", "0", "--max_steps", "1"]
    printed = run_training(tiny_inputs, tmp_path / "out", *flags, *more, ranks=ranks).stdout
    assert "Checkpoint adapters: continued (use_backbone_lora 4, use_llm_lora 4)" in printed
    continued, first = load_weights(tmp_path / "out"), load_weights(output)
    assert all(torch.equal(continued[name], tensor) for name, tensor in first.items() if ".lora_" in name)


@pytest.mark.multiprocess
def test_merged_weights_are_the_base_plus_the_adapters(qlora_run, tiny_inputs, tmp_path, capsys):
    """The base is the checkpoint that was quantized, not its 4-bit weights."""
    _, _, output = qlora_run
    merge_lora.main([str(output), str(tmp_path / "merged"), "--dtype", "float32"])
    assert "Merged checkpoint" in capsys.readouterr().out
    adapted, merged = load_weights(output), load_weights(tmp_path / "merged")
    base, num_adapted = load_weights(tiny_inputs / "model"), 0
    for name, tensor in merged.items():
        part, _, key = name.partition(".")
        prefix = f"{part}.base_model.model.{key.removesuffix('.weight')}"
        delta = 0
        if f"{prefix}.lora_A.default.weight" in adapted:
            factors = [adapted[f"{prefix}.lora_{factor}.default.weight"] for factor in "BA"]
            delta, num_adapted = 2 * factors[0] @ factors[1], num_adapted + 1  # lora_alpha / rank = 2
        torch.testing.assert_close(tensor, base[name] + delta, rtol=0, atol=1e-7)
    assert num_adapted == sum(".lora_A." in name for name in adapted)


def test_only_the_error_of_quantization_separates_both_models(tiny_inputs, tmp_path, monkeypatch):
    """Compare 4-bit with full weights under the same trained adapters."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "out"), *QUANTIZED, "--save_strategy", "no"])
    for part in PART_FLAGS:
        dtypes = {parameter.dtype for parameter in getattr(trainer.model, part).parameters()}
        assert (torch.uint8 in dtypes) == (part != "mlp1"), part
    trainer.train()
    trainer.save_model()
    opened = InternVLChatModel.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    batch = prepare_batch(trainer, trainer.data_collator([trainer.train_dataset[(0, 0)]]))
    models, losses = {"4-bit": trainer.model, "full": opened}, {}
    models["merged"] = merge_adapters(InternVLChatModel.from_pretrained(tmp_path / "out"))
    for name, model in models.items():
        model.img_context_token_id = trainer.model.img_context_token_id
        with torch.no_grad():
            losses[name] = model.eval()(**batch).loss.item()
    assert losses["merged"] == pytest.approx(losses["full"], abs=1e-5)
    assert losses["4-bit"] == pytest.approx(losses["full"], rel=0.02) and losses["4-bit"] != losses["full"]


def test_evaluation_does_not_change_the_weights(build_from_flags):
    """bitsandbytes would rearrange them on some CPUs, and round their scales."""
    model = build_from_flags(*TRAIN_ADAPTERS, *"--quantize_backbone True --quantize_llm True".split())
    ids = torch.arange(1, 33)[None]

    def compute_loss(is_training: bool) -> float:
        with torch.no_grad():
            return model.train(is_training)(input_ids=ids, labels=ids, position_ids=ids - 1).loss.item()

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert compute_loss(True) == compute_loss(False) == compute_loss(True)


@pytest.mark.gpu
def test_quantized_base_gets_trainable_adapters(build_from_flags, tmp_path):
    flags = [*FREEZE_ALL, "--use_llm_lora", "2", "--quantize_llm", "True", "--bf16", "True"]
    model = build_from_flags(*flags).cuda().train()
    ids = torch.arange(1, 33, device="cuda")[None]
    model(input_ids=ids, labels=ids, position_ids=ids - 1).loss.backward()
    layers = {name: p for name, p in model.language_model.named_parameters() if ".q_proj." in name}
    assert {p.dtype for name, p in layers.items() if "lora_" not in name and name.endswith("weight")} == {torch.uint8}
    assert all(p.grad.isfinite().all() for name, p in layers.items() if "lora_" in name)
    save_adapter_checkpoint(model, tmp_path, gather_trained_tensors(model))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.multiprocess
@pytest.mark.parametrize("module", ["train.internvl_chat_finetune", "model.internvl_chat", "arguments.training"])
def test_import_prints_nothing(module):
    """PEFT imports bitsandbytes, which would print a line."""
    command = [sys.executable, "-W", "ignore", "-c", f"import internvl.{module}, bitsandbytes"]
    env = os.environ | {"PYTHONPATH": str(PACKAGE_DIR)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("part", ["backbone", "llm"])
def test_old_bitsandbytes_requires_cuda(build_from_flags, part, monkeypatch):
    monkeypatch.setattr("internvl.train.quantization.version", lambda name: "0.48.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = f"--quantize_{part} True requires a CUDA device, or bitsandbytes >= 0.49"
    with pytest.raises(ValueError, match=message):
        build_from_flags(*FREEZE_ALL, f"--use_{part}_lora", "2", f"--quantize_{part}", "True")
