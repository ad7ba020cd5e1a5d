"""Packed rows in training: the same loss as apart, interrupted and resumed anywhere, by other ranks, on other data."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import skip_first_batches
from helpers.samples import samples_equal
from helpers.training_runs import FULL, LORA, flags_of, history, losses, prepare, run, run_until, weights

PACKED = "--use_packed_ds True --max_packed_tokens 200 --num_images_expected 13 --strict_mode False".split()
ONE_STEP = "--max_steps 1 --loss_reduction_all_gather True --loss_reduction square --max_grad_norm 0".split()


@pytest.fixture(autouse=True)
def cache(tiny, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))


def test_the_loss_of_a_step_is_that_of_its_tokens_in_any_layout(tiny, tmp_path):
    """All 13 samples in one step: packed or not, in whatever micro-batches, with one empty."""
    layouts = {
        "apart": ["--gradient_accumulation_steps", "13"],
        "of_5": ["--per_device_train_batch_size", "5", "--gradient_accumulation_steps", "3"],
        "packed": [*PACKED, "--gradient_accumulation_steps", "12"],
        "padded": [*PACKED, "--gradient_accumulation_steps", "14", "--strict_mode", "True"],
    }
    for name, flags in layouts.items():
        trainer = prepare([*flags_of(tiny, tmp_path / name), *FULL, *ONE_STEP, *flags])
        assert len(trainer.schedule.plan(0)) == 1
        trainer.train()
        trainer.save_model()
        trainer.save_state()
    expected = weights(tmp_path / "apart")
    start = weights(tiny / "model")
    assert any((expected[name] - start[name]).abs().max() > 1e-4 for name in expected)
    for name in list(layouts)[1:]:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "apart"), rel=1e-5), name
        assert [step["grad_norm"] for step in history(tmp_path / name)] == pytest.approx(
            [step["grad_norm"] for step in history(tmp_path / "apart")], rel=1e-4
        ), name


def test_killed_on_two_ranks_goes_on_there_as_if_nothing_was_and_elsewhere_with_the_rest(tiny, tmp_path):
    """The recipe's kind of run, ZeRO-2, in steps of 2 rows, a sample split: resumed in the middle of an epoch."""
    flags = [
        *LORA,
        *PACKED,
        "--max_packed_tokens",
        "140",
        "--allow_overflow",
        "True",
        "--deepspeed",
        "zero_stage2_config.json",
        "--gradient_accumulation_steps",
        "1",
    ]
    flags += ["--max_steps", "7", "--save_steps", "2"]
    printed = run(tiny, tmp_path / "unbroken", *flags, ranks=2).stdout
    for line in ("samples", "tokens", "tiles", "rows", "steps", "waiting", "longest row", "time goes to"):
        assert re.search(rf"^  {line} +\S", printed, re.MULTILINE), line
    run_until(tmp_path / "killed/checkpoint-2", tiny, tmp_path / "killed", *flags, ranks=2)
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    run(tiny, tmp_path / "killed", *flags, ranks=2)
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "unbroken")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    # One rank, accumulating otherwise: each sample of the epoch that was begun is seen once in all.
    alone = [*flags_of(tiny, tmp_path / "alone"), *flags, "--gradient_accumulation_steps", "3"]
    trainer = prepare([flag for flag in alone if flag not in ("--deepspeed", "zero_stage2_config.json")])
    state = json.loads((tmp_path / "alone/checkpoint-2/data_state.json").read_text())
    trainer.go_on_from(tmp_path / "alone/checkpoint-2")
    epoch, step = trainer.went_on_at
    (stretch,) = state["stretches"]
    assert state["epoch"] == epoch and stretch["steps"] == step and stretch["layout"]["world_size"] == 2
    seen, steps = trainer.schedule._seen(trainer.schedule.begun)
    rest = trainer.schedule.plan(epoch)
    usable = trainer.schedule.lengths.tokens > 0
    assert trainer.train_dataset.parts and usable.sum() < len(usable)
    assert (
        steps == step and (seen + rest.seen(len(rest), len(usable)) == usable).all() and 0 < seen.sum() < usable.sum()
    )


def test_batches_after_resuming_are_those_of_the_unbroken_run_to_the_byte(tiny, tmp_path):
    flags = [*flags_of(tiny, tmp_path / "out"), *LORA, *PACKED, "--gradient_accumulation_steps", "1"]
    trainer = prepare([*flags, "--dataloader_num_workers", "0"])
    trainer.epoch = 1
    whole = list(trainer.get_train_dataloader())
    again = prepare([*flags, "--dataloader_num_workers", "2"])
    assert again.schedule.go_on(trainer.schedule.state(1, 3)) == (1, 3)
    again.epoch = 1
    rest = list(skip_first_batches(again.get_train_dataloader(), 3))
    assert len(rest) == len(whole) - 3 > 0
    for one, other in zip(whole[3:], rest, strict=True):
        assert all(one.pop(key) == other.pop(key) for key in ("cu_seqlens", "documents", "bad_samples"))
        assert one.keys() == other.keys() and samples_equal(one, other)
        assert one["pixel_values"].dtype == torch.uint8


def test_changed_data_is_refused_or_accepted_with_the_count_of_differences(tiny, tmp_path, caplog):
    own = tmp_path / "tiny"
    shutil.copytree(tiny, own)
    meta = json.loads((own / "meta.json").read_text())
    meta["tiny"]["annotation"] = str(own / "train.jsonl")
    (own / "meta.json").write_text(json.dumps(meta))
    flags = [*flags_of(own, tmp_path / "out"), *FULL, *PACKED, "--gradient_accumulation_steps", "1"]
    flags += ["--max_steps", "3", "--save_steps", "2"]
    prepare(flags).train()
    checkpoint = str(tmp_path / "out/checkpoint-2")

    lines = (own / "train.jsonl").read_text().splitlines()
    changed = lines[0].replace('"value": "', '"value": "Well, ', 1)
    (own / "train.jsonl").write_text("\n".join([changed, *lines[2:]]))
    with pytest.raises(
        ValueError, match="1 of its 12 samples are new, 2 of the 13 before are gone.*--accept_changed_data"
    ):
        prepare(flags).train(resume_from_checkpoint=checkpoint)
    caplog.set_level("WARNING", "internvl")
    trainer = prepare([*flags, "--accept_changed_data", "True", "--max_steps", "5"])
    trainer.train(resume_from_checkpoint=checkpoint)
    assert "the data has changed since the checkpoint: 1 of its 12 samples are new" in caplog.text
    assert trainer.state.global_step == 5

    Path(checkpoint, "data_state.json").unlink()
    with pytest.raises(ValueError, match="does not tell which samples have been seen"):
        prepare(flags).train(resume_from_checkpoint=checkpoint)


def test_a_step_without_pictures_runs_the_vision_encoder_only_where_it_trains(tiny, tmp_path):
    text = {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]}
    (tmp_path / "text.jsonl").write_text("\n".join([json.dumps(text)] * 4))
    meta = {"text": {"root": "", "annotation": str(tmp_path / "text.jsonl"), "repeat_time": 1, "data_augment": False}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    data = ["--meta_path", str(tmp_path / "meta.json")]
    for flags, sides in ((["--freeze_backbone", "True", "--freeze_mlp", "True"], []), (LORA, [28]), (FULL, [28])):
        trainer = prepare([*flags_of(tiny, tmp_path / "out"), *flags, *data])
        seen = []
        trainer.model.vision_model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["pixel_values"].shape[-1]), with_kwargs=True
        )
        (batch,) = [trainer._prepare_inputs(batch) for batch in [next(iter(trainer.get_train_dataloader()))]]
        assert batch["pixel_values"].shape[0] == 0
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        assert seen == sides
        vision = [*trainer.model.vision_model.parameters(), *trainer.model.mlp1.parameters()]
        assert all(p.grad is not None and not p.grad.any() for p in vision if p.requires_grad)
        trainer.model.eval()
        with torch.no_grad():
            assert trainer.model(**batch).loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert seen == sides, "nothing trains, nothing is shown"
