"""Adapters through training, resuming, merging and export: the outputs stay equal."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.agreement import compute_probe_logits, make_probe
from helpers.training_runs import (
    FREEZE_ALL,
    ZERO_FLAGS,
    load_weights,
    read_losses,
    remove_image_tokens,
    run_training,
    run_training_until,
    train_in_process,
)
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import fingerprint_weights, strip_peft_prefix
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools import merge_lora
from internvl.tools.internvl_custom2hf import main as custom2hf
from internvl.tools.internvl_hf2custom import main as hf2custom

SAVE_FULL_MODEL = ["--save_full_model", "True"]
VISION, LLM = ["--use_backbone_lora", "4"], ["--use_llm_lora", "4"]
TRAINABLE_PARTS = {
    "vision": [*FREEZE_ALL, *VISION],
    "llm": [*FREEZE_ALL, *LLM],
    "both": [*FREEZE_ALL, *VISION, *LLM],
    "both and projector": [*FREEZE_ALL, *VISION, *LLM, "--freeze_mlp", "False"],
}


def load_model(folder: Path, **kwargs) -> InternVLChatModel:
    return InternVLChatModel.from_pretrained(folder, **kwargs).eval()


def assert_logits_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def list_files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


# Every entry of both tables once. All sixteen combinations take a quarter of an hour.
COMBINATIONS = list(zip(TRAINABLE_PARTS, ZERO_FLAGS, strict=True))
if os.environ.get("INTERNVL_ALL_COMBINATIONS") == "1":
    COMBINATIONS = list(itertools.product(TRAINABLE_PARTS, ZERO_FLAGS))


@pytest.mark.multiprocess
@pytest.mark.parametrize(("parts", "strategy"), COMBINATIONS)
def test_outputs_stay_equal_from_training_to_export(tiny_inputs, tmp_path, monkeypatch, parts, strategy):
    flags, uses_deepspeed = [*TRAINABLE_PARTS[parts], *ZERO_FLAGS[strategy]], strategy != "none"
    num_ranks = 2 if uses_deepspeed else 1
    base, tokenizer = load_weights(tiny_inputs / "model"), load_tokenizer(tiny_inputs / "model")

    # Train without an interruption.
    unbroken = tmp_path / "unbroken"
    run_training(tiny_inputs, unbroken, *flags, ranks=num_ranks)
    check_saved_files(unbroken, parts, base, uses_deepspeed)

    # Kill a run after its first checkpoint, with a part of the second on disk, which must not count as a checkpoint.
    resumed = tmp_path / "resumed"
    run_training_until(resumed / "checkpoint-3", tiny_inputs, resumed, *flags, ranks=num_ranks)
    shutil.rmtree(resumed / "unfinished", ignore_errors=True)
    shutil.copytree(unbroken / "checkpoint-6", resumed / "unfinished/checkpoint-6")
    (resumed / "unfinished/checkpoint-6/trainer_state.json").unlink()

    # Resume it.
    printed = run_training(tiny_inputs, resumed, *flags, ranks=num_ranks).stdout
    assert f"Latest valid checkpoint: {resumed / 'checkpoint-3'}" in printed
    assert read_losses(resumed) == read_losses(unbroken)
    assert {file for file in list_files(unbroken) if not file.startswith("runs/")} <= list_files(resumed)
    assert not (resumed / "unfinished").exists()
    expected = compute_probe_logits(load_model(unbroken), tokenizer)
    assert torch.equal(compute_probe_logits(load_model(resumed), tokenizer), expected)
    assert not torch.allclose(expected, compute_probe_logits(load_model(tiny_inputs / "model"), tokenizer), atol=1e-3)

    # Train adapters of another rank: the old ones are merged, the new ones are zero at a learning rate of 0.
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    start = ["--model_name_or_path", str(resumed), *FREEZE_ALL, "--use_backbone_lora", "2", "--use_mlp_lora", "2"]
    train_in_process(tiny_inputs, tmp_path / "continued", *start, "--max_steps", "1", "--learning_rate", "0")
    assert_logits_close(compute_probe_logits(load_model(tmp_path / "continued"), tokenizer), expected)

    # Merge, export to transformers' native format, and convert back.
    merge_lora.main([str(tmp_path / "continued"), str(tmp_path / "merged"), "--dtype", "float32"])
    assert_logits_close(compute_probe_logits(load_model(tmp_path / "merged"), tokenizer), expected)
    custom2hf(["--custom_path", str(tmp_path / "merged"), "--save_path", str(tmp_path / "native")])
    native = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native").eval()
    with torch.no_grad():
        assert_logits_close(native(**make_probe(tokenizer, load_model(unbroken).num_image_token)).logits, expected)
    hf2custom(["--hf_path", str(tmp_path / "native"), "--save_path", str(tmp_path / "converted_back")])
    assert_logits_close(compute_probe_logits(load_model(tmp_path / "converted_back"), tokenizer), expected)


def check_saved_files(folder: Path, parts: str, base: dict, uses_deepspeed: bool) -> None:
    """Assert that output folder and checkpoint hold only trained tensors."""
    has_adapters = {
        "vision_model": "vision" in parts or "both" in parts,
        "language_model": "llm" in parts or "both" in parts,
    }
    trains_projector = "projector" in parts
    trained_base_names = {name for name in base if trains_projector and name.startswith("mlp1.")}
    for saved in (folder, folder / "checkpoint-6"):
        assert not list(saved.glob("model*.safetensors"))
        for part, is_adapted in has_adapters.items():
            assert (saved / part / "adapter_model.safetensors").exists() == is_adapted
        assert (saved / "trained.safetensors").exists() == trains_projector
    if trains_projector:
        projector = load_file(folder / "trained.safetensors")
        assert projector.keys() == trained_base_names
        assert any(not torch.equal(tensor, base[name]) for name, tensor in projector.items())
    for part, is_adapted in has_adapters.items():
        if is_adapted:
            file = folder / part / "adapter_model.safetensors"
            adapter_bytes = sum(tensor.nbytes for tensor in load_file(file).values())
            header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")  # not negligible in a tiny model
            assert file.stat().st_size - header_bytes <= 1.05 * adapter_bytes
    loaded = {strip_peft_prefix(name): tensor for name, tensor in load_model(folder).state_dict().items()}
    unchanged = {name for name, tensor in base.items() if torch.equal(tensor, loaded[name])}
    assert unchanged == base.keys() - trained_base_names
    if uses_deepspeed:
        states = load_file(folder / "checkpoint-6/optimizer.safetensors")  # "NAME.exp_avg" and so on
        names = {name.replace("base_model.model.", "").rpartition(".")[0] for name in states}
        assert names & base.keys() <= trained_base_names
    assert not [*folder.rglob("global_step*")], "no files of DeepSpeed's own format"


@pytest.fixture(scope="module")
def trained(tiny_inputs, tmp_path_factory) -> Path:
    """Train adapters in both parts and the projector; return the output folder."""
    output = tmp_path_factory.mktemp("lifecycle") / "trained"
    run_training(tiny_inputs, output, *TRAINABLE_PARTS["both and projector"])
    return output


@pytest.mark.multiprocess
def test_training_continues_with_the_same_adapters(tiny_inputs, trained, tmp_path):
    continued = tmp_path / "continued"
    start = ["--model_name_or_path", str(trained), "--max_steps", "3"]
    printed = run_training(tiny_inputs, continued, *TRAINABLE_PARTS["both"], *start).stdout
    assert "Checkpoint adapters: continued (use_backbone_lora 4, use_llm_lora 4)" in printed
    model = load_model(continued)
    assert model.base_checkpoint["path"] == str((tiny_inputs / "model").resolve()), "the base model of the first run"
    before, after = load_model(trained).state_dict(), model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora_" in name for name in changed), "the projector is frozen in the second run"


# flags, number of ranks, LoRA ranks in vision encoder and LLM
MERGED = {
    "another LoRA rank, ZeRO-3": (["--use_backbone_lora", "2", *ZERO_FLAGS["zero3"]], 2, (2, 0)),
    "requested": ([*VISION, *LLM, "--merge_before_training", "True"], 1, (4, 4)),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize(("flags", "num_ranks", "lora_ranks"), MERGED.values(), ids=MERGED)
def test_adapters_are_merged_before_new_ones_are_added(tiny_inputs, trained, tmp_path, flags, num_ranks, lora_ranks):
    continued = tmp_path / "continued"
    start = ["--model_name_or_path", str(trained), "--max_steps", "1", "--learning_rate", "0"]
    printed = run_training(tiny_inputs, continued, *FREEZE_ALL, *flags, *start, ranks=num_ranks).stdout
    assert "Checkpoint adapters: merged before training (use_backbone_lora 4, use_llm_lora 4)" in printed
    tokenizer, model = load_tokenizer(trained), load_model(continued)
    assert (model.config.use_backbone_lora, model.config.use_llm_lora) == lora_ranks
    expected = compute_probe_logits(load_model(trained), tokenizer)
    assert_logits_close(compute_probe_logits(model, tokenizer), expected)
    merge_lora.main([str(continued), str(tmp_path / "merged"), "--dtype", "float32"])
    assert_logits_close(compute_probe_logits(load_model(tmp_path / "merged"), tokenizer), expected)


def test_new_tokens_and_larger_tiles_are_not_stored(tiny_inputs, tmp_path, monkeypatch):
    """Loading derives them from the base model."""
    shutil.copytree(tiny_inputs, tmp_path / "tiny", ignore=shutil.ignore_patterns("cache"))
    remove_image_tokens(tmp_path / "tiny/model")
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    flags = [*TRAINABLE_PARTS["vision"], "--force_image_size", "112", "--max_steps", "2"]
    for name, more_flags in {"adapters": [], "full": SAVE_FULL_MODEL}.items():
        train_in_process(tmp_path / "tiny", tmp_path / name, *flags, *more_flags)
    model = load_model(tmp_path / "adapters")
    assert model.num_image_token == 16 and "known_tokens" in model.base_checkpoint
    state, full_state = model.state_dict(), load_model(tmp_path / "full").state_dict()
    assert state.keys() == full_state.keys()
    assert all(torch.equal(tensor, full_state[name]) for name, tensor in state.items())
    assert not (tmp_path / "adapters/trained.safetensors").exists()


@pytest.mark.multiprocess
def test_unwritable_output_folder_is_reported_before_the_first_step(tiny_inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/unfinished").write_text("a file where the checkpoint manager needs a folder")
    flags = TRAINABLE_PARTS["vision"]
    failed = run_training(tiny_inputs, tmp_path / "out", *flags, status=1)
    assert [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "unfinished" in failed.stderr and "step 1/6" not in failed.stdout
    no_checkpoints = ["--no_smoke_save", "--save_strategy", "no"]
    assert "step 1/6" in run_training(tiny_inputs, tmp_path / "out", *flags, *no_checkpoints).stdout


@pytest.mark.multiprocess
def test_full_model_is_saved_in_upstreams_layout(tiny_inputs, trained, tmp_path):
    run_training(tiny_inputs, tmp_path / "out", *TRAINABLE_PARTS["both and projector"], *SAVE_FULL_MODEL)
    tokenizer = load_tokenizer(trained)
    logits, expected = (compute_probe_logits(load_model(folder), tokenizer) for folder in (tmp_path / "out", trained))
    assert torch.equal(logits, expected)
    assert len(load_weights(tmp_path / "out")) > len(load_weights(tiny_inputs / "model"))
    assert not (tmp_path / "out/vision_model").exists()


@pytest.mark.multiprocess
def test_peft_loads_the_adapters_of_each_part(tiny_inputs, trained):
    from peft import PeftModel

    model, expected = load_model(tiny_inputs / "model"), load_model(trained).state_dict()
    for part in ("vision_model", "language_model"):
        adapted = PeftModel.from_pretrained(getattr(model, part), trained / part)
        assert all(torch.equal(tensor, expected[f"{part}.{name}"]) for name, tensor in adapted.state_dict().items())


@pytest.mark.multiprocess
def test_base_model_may_move_but_not_change(tiny_inputs, trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_inputs / "model", moved)
    assert fingerprint_weights(moved) == fingerprint_weights(tiny_inputs / "model")
    tokenizer = load_tokenizer(moved)
    logits = compute_probe_logits(load_model(trained, base_model=moved), tokenizer)
    assert torch.equal(logits, compute_probe_logits(load_model(trained), tokenizer))
    tensors = load_file(moved / "model.safetensors")
    tensors["vision_model.encoder.layers.0.norm1.weight"] *= 1.01
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was trained on a base checkpoint other than .*moved"):
        load_model(trained, base_model=moved)
    with pytest.raises(ValueError, match="base checkpoint .*absent.* is unusable.*Pass base_model=... if it has moved"):
        load_model(trained, base_model=tmp_path / "absent")


ADAPTER = "vision_model/adapter_model.safetensors"


def change_tensors(change_fn):
    """Return a function that changes the tensors of a saved adapter.

    `change_fn` gets all tensors and the name of one.
    """

    def damage(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER)
        change_fn(tensors, sorted(tensors)[0])
        save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})

    return damage


def truncate(folder: Path) -> None:
    content = (folder / ADAPTER).read_bytes()
    (folder / ADAPTER).write_bytes(content[: len(content) // 2])


DAMAGES = {
    "truncated": (truncate, "adapter_model.safetensors is not a complete safetensors file"),
    "missing": (change_tensors(lambda t, name: t.pop(name)), "missing: vision_model.*lora_A.default.weight"),
    "renamed": (
        change_tensors(lambda t, name: t.update({name + "x": t.pop(name)})),
        "missing: .*; unexpected: .*weightx",
    ),
    "extra": (change_tensors(lambda t, name: t.update(extra=torch.zeros(1))), "unexpected: vision_model.extra"),
    "wrong shape": (change_tensors(lambda t, name: t.update({name: t[name][1:].clone()})), r"mismatched: .* for \("),
    "NaN": (change_tensors(lambda t, name: t.update({name: t[name] * torch.nan})), "not finite: vision_model"),
    "no file": (lambda folder: (folder / ADAPTER).unlink(), "missing: vision_model"),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_adapter_is_an_error(trained, damage, message, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.multiprocess
def test_checkpoint_includes_preprocessor_tokenizer_and_template(tiny_inputs, trained):
    assert json.loads((trained / "preprocessor_config.json").read_text())["size"] == 56
    assert load_tokenizer(trained).get_vocab() == load_tokenizer(tiny_inputs / "model").get_vocab()
    assert load_model(trained).config.template == "internvl2_5"
    assert not (trained / "unfinished").exists()
