"""The life of an adapter: trained, killed, resumed, trained on, merged, exported, opened; equal at every hand-over."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.training_runs import losses, run, run_here, run_until, weights, without_image_tokens
from safetensors.torch import load_file, save_file
from tools import merge_lora
from tools.internvl_custom2hf import main as custom2hf
from tools.internvl_hf2custom import main as hf2custom
from transformers import InternVLForConditionalGeneration

from internvl.constants import IMG_CONTEXT_TOKEN
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import fingerprint_weights, strip_peft_prefix
from internvl.model.tokenizers.loading import load_tokenizer

FULL = ["--save_full_model", "True"]
FROZEN = "--freeze_backbone True --freeze_llm True --freeze_mlp True".split()
VISION, LLM = ["--use_backbone_lora", "4"], ["--use_llm_lora", "4"]
MIXES = {
    "vision": [*FROZEN, *VISION],
    "llm": [*FROZEN, *LLM],
    "both": [*FROZEN, *VISION, *LLM],
    "both and projector": [*FROZEN, *VISION, *LLM, "--freeze_mlp", "False"],
}
STAGES = {"no ZeRO": [], **{f"ZeRO-{n}": ["--deepspeed", f"zero_stage{n}_config.json"] for n in (1, 2, 3)}}


def opened(folder: Path, **kwargs) -> InternVLChatModel:
    return InternVLChatModel.from_pretrained(folder, **kwargs).eval()


def logits(model: InternVLChatModel, tokenizer) -> torch.Tensor:
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    with torch.no_grad():
        return model(**inputs(tokenizer, model.num_image_token)).logits


def inputs(tokenizer, image_tokens: int) -> dict[str, torch.Tensor]:
    ids = tokenizer(IMG_CONTEXT_TOKEN * image_tokens + "What is it?", return_tensors="pt").input_ids
    return {
        "pixel_values": torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)),
        "input_ids": ids,
    }


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def stored(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


# Each mix and each stage once; all sixteen lives take a quarter of an hour.
LIVES = list(zip(MIXES, STAGES, strict=True))
if os.environ.get("INTERNVL_ALL_LIVES") == "1":
    LIVES = list(itertools.product(MIXES, STAGES))


@pytest.mark.parametrize(("mix", "stage"), LIVES)
def test_a_life(tiny, tmp_path, monkeypatch, mix, stage):
    flags, tokenizer, ranks = [*MIXES[mix], *STAGES[stage]], load_tokenizer(tiny / "model"), 1 + (stage != "no ZeRO")
    base = weights(tiny / "model")

    whole = tmp_path / "whole"
    run(tiny, whole, *flags, ranks=ranks)
    check_contents(whole, mix, base, stage != "no ZeRO")

    # Killed behind the first checkpoint, with what there might be of the second: that is not taken for one.
    broken = tmp_path / "broken"
    run_until(broken / "checkpoint-3", tiny, broken, *flags, ranks=ranks)
    shutil.rmtree(broken / "unfinished", ignore_errors=True)
    shutil.copytree(whole / "checkpoint-6", broken / "unfinished/checkpoint-6")
    (broken / "unfinished/checkpoint-6/trainer_state.json").unlink()
    assert f"resuming from {broken / 'checkpoint-3'}" in run(tiny, broken, *flags, ranks=ranks).stdout
    assert losses(broken) == losses(whole)
    assert {file for file in stored(whole) if not file.startswith("runs/")} <= stored(broken)
    assert not (broken / "unfinished").exists()
    trained = logits(opened(whole), tokenizer)
    assert torch.equal(logits(opened(broken), tokenizer), trained)
    assert not torch.allclose(trained, logits(opened(tiny / "model"), tokenizer), atol=1e-3)

    # With another rank: merged, and new adapters, which have learned nothing yet.
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    start = ["--model_name_or_path", str(broken), *FROZEN, "--use_backbone_lora", "2", "--use_mlp_lora", "2"]
    run_here(tiny, tmp_path / "on", *start, "--max_steps", "1", "--learning_rate", "0")
    same(logits(opened(tmp_path / "on"), tokenizer), trained)

    merge_lora.main([str(tmp_path / "on"), str(tmp_path / "merged"), "--dtype", "float32"])
    same(logits(opened(tmp_path / "merged"), tokenizer), trained)
    custom2hf(["--custom_path", str(tmp_path / "merged"), "--save_path", str(tmp_path / "native")])
    native = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native").eval()
    with torch.no_grad():
        same(native(**inputs(tokenizer, opened(whole).num_image_token)).logits, trained)
    hf2custom(["--hf_path", str(tmp_path / "native"), "--save_path", str(tmp_path / "back")])
    same(logits(opened(tmp_path / "back"), tokenizer), trained)


def check_contents(folder: Path, mix: str, base: dict, stage: bool) -> None:
    """What trained, and no frozen weight, also in the checkpoints to resume from."""
    parts = {"vision_model": "vision" in mix or "both" in mix, "language_model": "llm" in mix or "both" in mix}
    projector = "projector" in mix
    for place in (folder, folder / "checkpoint-6"):
        assert not list(place.glob("model*.safetensors"))
        for part, trained in parts.items():
            assert (place / part / "adapter_model.safetensors").exists() == trained
        assert (place / "trained.safetensors").exists() == projector
    if projector:
        rest = load_file(folder / "trained.safetensors")
        assert rest.keys() == {name for name in base if name.startswith("mlp1.")}
        assert any(not torch.equal(tensor, base[name]) for name, tensor in rest.items())
    for part, trained in parts.items():
        if trained:
            file = folder / part / "adapter_model.safetensors"
            adapters = sum(tensor.nbytes for tensor in load_file(file).values())
            names = 8 + int.from_bytes(file.read_bytes()[:8], "little")  # they weigh in a tiny model
            assert file.stat().st_size - names <= 1.05 * adapters
    opened_again = {strip_peft_prefix(name): tensor for name, tensor in opened(folder).state_dict().items()}
    same_as_base = {name for name, tensor in base.items() if torch.equal(tensor, opened_again[name])}
    assert same_as_base == {name for name in base if not (projector and name.startswith("mlp1."))}
    file = folder / "checkpoint-6/optimizer.safetensors"
    names = {name.replace("base_model.model.", "").rpartition(".")[0] for name in load_file(file)} if stage else set()
    assert not names & base.keys() - {name for name in base if projector and name.startswith("mlp1.")}
    assert not [*folder.rglob("global_step*")]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("life") / "trained"
    run(tiny, output, *MIXES["both and projector"])
    return output


def test_training_goes_on_with_the_same_adapters(tiny, trained, tmp_path):
    start = ["--model_name_or_path", str(trained)]
    printed = run(tiny, tmp_path / "on", *MIXES["both"], *start, "--max_steps", "3").stdout
    assert "training goes on with the checkpoint's adapters (use_backbone_lora 4, use_llm_lora 4)" in printed
    before, after = opened(trained), opened(tmp_path / "on")
    assert after.base_checkpoint["path"] == str((tiny / "model").resolve()), "the base of the base"
    ours, theirs = after.state_dict(), before.state_dict()
    assert ours.keys() == theirs.keys()
    moved = {name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])}
    assert moved and all("lora_" in name for name in moved), "the projector, trained before, stays as it was"


MERGED = {
    "another rank, ZeRO-3": (["--use_backbone_lora", "2", *STAGES["ZeRO-3"]], 2, (2, 0)),
    "asked for": ([*VISION, *LLM, "--merge_before_training", "True"], 1, (4, 4)),
}


@pytest.mark.parametrize(("flags", "processes", "ranks"), MERGED.values(), ids=MERGED)
def test_adapters_are_merged_before_others_are_added(tiny, trained, tmp_path, flags, processes, ranks):
    start = ["--model_name_or_path", str(trained), "--max_steps", "1", "--learning_rate", "0"]
    printed = run(tiny, tmp_path / "on", *FROZEN, *flags, *start, ranks=processes).stdout
    assert "adapters (use_backbone_lora 4, use_llm_lora 4) are merged into its weights before training" in printed
    tokenizer, after = load_tokenizer(trained), opened(tmp_path / "on")
    assert (after.config.use_backbone_lora, after.config.use_llm_lora) == ranks
    same(logits(after, tokenizer), logits(opened(trained), tokenizer))
    merge_lora.main([str(tmp_path / "on"), str(tmp_path / "merged"), "--dtype", "float32"])
    same(logits(opened(tmp_path / "merged"), tokenizer), logits(opened(trained), tokenizer))


def test_new_tokens_and_larger_tiles_need_not_be_stored(tiny, tmp_path, monkeypatch):
    """What is added to the base follows from it."""
    shutil.copytree(tiny, tmp_path / "tiny", ignore=shutil.ignore_patterns("cache"))
    without_image_tokens(tmp_path / "tiny/model")
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    for name, more in {"out": [], "full": FULL}.items():
        run_here(
            tmp_path / "tiny", tmp_path / name, *MIXES["vision"], "--force_image_size", "112", "--max_steps", "2", *more
        )
    partial, full = opened(tmp_path / "out"), opened(tmp_path / "full")
    assert partial.num_image_token == 16 and "known_tokens" in partial.base_checkpoint
    ours, theirs = partial.state_dict(), full.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert not (tmp_path / "out/trained.safetensors").exists()


def test_a_disk_that_takes_no_checkpoint_is_known_before_the_first_step(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/unfinished").write_text("in the way")
    done = run(tiny, tmp_path / "out", *MIXES["vision"], status=1)
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "unfinished" in done.stderr and "'loss'" not in done.stdout
    assert "'loss'" in run(tiny, tmp_path / "out", *MIXES["vision"], "--no_smoke_save", "--save_strategy", "no").stdout


def test_the_whole_model_in_upstreams_layout(tiny, trained, tmp_path):
    run(tiny, tmp_path / "out", *MIXES["both and projector"], *FULL)
    tokenizer = load_tokenizer(trained)
    assert torch.equal(logits(opened(tmp_path / "out"), tokenizer), logits(opened(trained), tokenizer))
    assert len(weights(tmp_path / "out")) > len(weights(tiny / "model"))
    assert not (tmp_path / "out/vision_model").exists()


def test_peft_opens_each_part_as_it_is(tiny, trained):
    from peft import PeftModel

    model, expected = opened(tiny / "model"), opened(trained).state_dict()
    for part in ("vision_model", "language_model"):
        wrapped = PeftModel.from_pretrained(getattr(model, part), trained / part)
        assert all(torch.equal(tensor, expected[f"{part}.{name}"]) for name, tensor in wrapped.state_dict().items())


def test_the_base_may_move_but_not_change(tiny, trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(tiny / "model", moved)
    assert fingerprint_weights(moved) == fingerprint_weights(tiny / "model")
    tokenizer = load_tokenizer(moved)
    assert torch.equal(logits(opened(trained, base_model=moved), tokenizer), logits(opened(trained), tokenizer))
    tensors = load_file(moved / "model.safetensors")
    tensors["vision_model.encoder.layers.0.norm1.weight"] *= 1.01
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was trained on another base than .*moved"):
        opened(trained, base_model=moved)
    with pytest.raises(ValueError, match="stands on the base .*nowhere.*say base_model=... if it has moved"):
        opened(trained, base_model=tmp_path / "nowhere")


ADAPTER = "vision_model/adapter_model.safetensors"


def rewritten(change):
    def damage(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER)
        change(tensors, sorted(tensors)[0])
        save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})

    return damage


def cut_short(folder: Path) -> None:
    content = (folder / ADAPTER).read_bytes()
    (folder / ADAPTER).write_bytes(content[: len(content) // 2])


DAMAGES = {
    "cut short": (cut_short, "adapter_model.safetensors is damaged"),
    "missing": (rewritten(lambda tensors, name: tensors.pop(name)), "missing: vision_model.*lora_A.default.weight"),
    "renamed": (rewritten(lambda t, name: t.update({name + "x": t.pop(name)})), "missing: .*\nunexpected: .*weightx"),
    "extra": (rewritten(lambda tensors, name: tensors.update(extra=torch.zeros(1))), "unexpected: vision_model.extra"),
    "another shape": (rewritten(lambda t, name: t.update({name: t[name][1:].clone()})), r"mismatched: .* for \("),
    "not a number": (rewritten(lambda t, name: t.update({name: t[name] * torch.nan})), "not finite: vision_model"),
    "no file": (lambda folder: (folder / ADAPTER).unlink(), "missing: vision_model"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_refused(trained, damage, message, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    damage(folder)
    with pytest.raises(ValueError, match=message):
        opened(folder)


def test_what_a_checkpoint_brings_along(tiny, trained):
    assert json.loads((trained / "preprocessor_config.json").read_text())["size"] == 56
    assert load_tokenizer(trained).get_vocab() == load_tokenizer(tiny / "model").get_vocab()
    assert opened(trained).config.template == "internvl2_5"
    assert not (trained / "unfinished").exists()
