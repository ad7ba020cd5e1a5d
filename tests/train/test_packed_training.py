"""Train on packed rows: loss, resuming, other ranks, changed data."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.samples import are_samples_equal
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    TRAIN_LLM_AND_PROJECTOR,
    build_run_flags,
    load_weights,
    prepare_batch,
    prepare_trainer,
    read_losses,
    read_step_logs,
    run_training,
    run_training_until,
)

from internvl.planning.data_state import resume_data

PACKED = "--use_packed_ds True --max_packed_tokens 200 --num_images_expected 13 --strict_mode False".split()
ONE_STEP = "--max_steps 1 --loss_reduction_all_gather True --loss_reduction square --max_grad_norm 0".split()


@pytest.fixture(autouse=True)
def share_cache(tiny_inputs, monkeypatch):
    """Measure sample lengths once for all tests."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))


def test_layout_does_not_change_the_loss_of_a_step(tiny_inputs, tmp_path):
    """All 13 samples in one step, in micro-batches of different sizes."""
    layouts = {
        "one_by_one": ["--gradient_accumulation_steps", "13"],
        "by_5": ["--per_device_train_batch_size", "5", "--gradient_accumulation_steps", "3"],
        "packed": [*PACKED, "--gradient_accumulation_steps", "12"],
        "padded": [*PACKED, "--gradient_accumulation_steps", "14", "--strict_mode", "True"],
    }
    for name, flags in layouts.items():
        trainer = prepare_trainer(
            [*build_run_flags(tiny_inputs, tmp_path / name), *TRAIN_LLM_AND_PROJECTOR, *ONE_STEP, *flags]
        )
        assert len(trainer.schedule.plan(0)) == 1
        trainer.train()
        trainer.save_model()
        trainer.save_state()
    expected = load_weights(tmp_path / "one_by_one")
    start = load_weights(tiny_inputs / "model")
    assert any((expected[name] - start[name]).abs().max() > 1e-4 for name in expected)
    for name in list(layouts)[1:]:
        assert read_losses(tmp_path / name) == pytest.approx(read_losses(tmp_path / "one_by_one"), rel=1e-5), name
        assert [step["grad_norm"] for step in read_step_logs(tmp_path / name)] == pytest.approx(
            [step["grad_norm"] for step in read_step_logs(tmp_path / "one_by_one")], rel=1e-4
        ), name


@pytest.mark.multiprocess
def test_killed_run_resumes_exactly_on_two_ranks_and_with_the_rest_of_the_epoch_on_one(tiny_inputs, tmp_path):
    """Resume within an epoch under ZeRO-2; one sample is split over rows."""
    flags = [
        *TRAIN_ADAPTERS,
        *PACKED,
        *"--max_packed_tokens 140 --allow_overflow True --gradient_accumulation_steps 1".split(),
    ]
    flags += "--deepspeed zero_stage2_config.json --max_steps 7 --save_steps 2".split()
    printed = run_training(tiny_inputs, tmp_path / "unbroken", *flags, ranks=2).stdout
    lines = ["samples", "tokens", "tiles", "rows", "longest row", "packing efficiency", "global batch size"]
    lines += ["steps per epoch", "load imbalance", "FLOPs"]
    for line in lines:
        assert re.search(rf"^  {line} +\S", printed, re.MULTILINE), line
    assert "2 rows = 2 ranks x 1 micro-batch x 1 gradient accumulation" in printed
    run_training_until(tmp_path / "killed/checkpoint-2", tiny_inputs, tmp_path / "killed", *flags, ranks=2)
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    run_training(tiny_inputs, tmp_path / "killed", *flags, ranks=2)
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "unbroken")
    ours, theirs = load_weights(tmp_path / "killed"), load_weights(tmp_path / "unbroken")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    # One rank with another accumulation: before and after resuming together, the epoch sees each sample once.
    alone = [*build_run_flags(tiny_inputs, tmp_path / "alone"), *flags, "--gradient_accumulation_steps", "3"]
    trainer = prepare_trainer([flag for flag in alone if flag not in ("--deepspeed", "zero_stage2_config.json")])
    state = json.loads((tmp_path / "alone/checkpoint-2/data_state.json").read_text())
    epoch, step = resume_data(
        trainer.schedule, tmp_path / "alone/checkpoint-2", accept_changed_data=False, global_step=2
    )
    (segment,) = state["segments"]
    assert state["epoch"] == epoch and segment["num_steps"] == step and segment["layout"]["world_size"] == 2
    partial_epoch = trainer.schedule.partial_epoch
    seen = trainer.schedule.count_seen(partial_epoch)
    rest = trainer.schedule.plan(epoch)
    usable = trainer.schedule.lengths["tokens"] > 0
    assert trainer.train_dataset.pieces and usable.sum() < len(usable)
    assert partial_epoch.num_steps == step and 0 < seen.sum() < usable.sum()
    assert (seen + rest.count_seen(len(rest), len(usable)) == usable).all()


def test_batches_after_resuming_equal_those_of_the_unbroken_run(tiny_inputs, tmp_path):
    flags = [
        *build_run_flags(tiny_inputs, tmp_path / "out"),
        *TRAIN_ADAPTERS,
        *PACKED,
        "--gradient_accumulation_steps",
        "1",
    ]
    trainer = prepare_trainer([*flags, "--dataloader_num_workers", "0"])
    trainer.epoch = 1
    unbroken = list(trainer.get_train_dataloader())
    again = prepare_trainer([*flags, "--dataloader_num_workers", "2"])
    assert again.schedule.resume_from(trainer.schedule.state_dict(1, 3)) == (1, 3)
    again.epoch, again.state.global_step = 1, 3
    rest = list(again.get_train_dataloader())
    assert len(rest) == len(unbroken) - 3 > 0
    for one, other in zip(unbroken[3:], rest, strict=True):
        assert all(one.pop(key) == other.pop(key) for key in ("cu_seqlens", "documents", "bad_samples"))
        assert one.keys() == other.keys() and are_samples_equal(one, other)
        assert one["pixel_values"].dtype == torch.uint8


def test_changed_data_is_an_error_unless_accepted(tiny_inputs, tmp_path, caplog):
    own = tmp_path / "tiny"
    shutil.copytree(tiny_inputs, own)
    meta = json.loads((own / "meta.json").read_text())
    meta["tiny"]["annotation"] = str(own / "train.jsonl")
    (own / "meta.json").write_text(json.dumps(meta))
    flags = [
        *build_run_flags(own, tmp_path / "out"),
        *TRAIN_LLM_AND_PROJECTOR,
        *PACKED,
        "--gradient_accumulation_steps",
        "1",
    ]
    flags += ["--max_steps", "3", "--save_steps", "2"]
    prepare_trainer(flags).train()
    checkpoint = str(tmp_path / "out/checkpoint-2")

    lines = (own / "train.jsonl").read_text().splitlines()
    changed = lines[0].replace('"value": "', '"value": "Well, ', 1)
    (own / "train.jsonl").write_text("\n".join([changed, *lines[2:]]))
    with pytest.raises(
        ValueError, match="1 of 12 samples are new, 2 of the previous 13 are removed.*--accept_changed_data"
    ):
        prepare_trainer(flags).train(resume_from_checkpoint=checkpoint)
    caplog.set_level("WARNING", "internvl")
    trainer = prepare_trainer([*flags, "--accept_changed_data", "True", "--max_steps", "5"])
    trainer.train(resume_from_checkpoint=checkpoint)
    assert "The data has changed since the checkpoint was written: 1 of 12 samples are new" in caplog.text
    assert trainer.state.global_step == 5

    Path(checkpoint, "data_state.json").unlink()
    with pytest.raises(ValueError, match="has no data_state.json: it is unknown which samples"):
        prepare_trainer(flags).train(resume_from_checkpoint=checkpoint)


def test_step_without_images_runs_the_vision_encoder_only_if_it_is_trainable(tiny_inputs, tmp_path):
    text = {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]}
    (tmp_path / "text.jsonl").write_text("\n".join([json.dumps(text)] * 4))
    meta = {"text": {"root": "", "annotation": str(tmp_path / "text.jsonl"), "repeat_time": 1, "data_augment": False}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    data = ["--meta_path", str(tmp_path / "meta.json")]
    for flags, sides in (
        (["--freeze_backbone", "True", "--freeze_mlp", "True"], []),
        (TRAIN_ADAPTERS, [28]),
        (TRAIN_LLM_AND_PROJECTOR, [28]),
    ):
        trainer = prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "out"), *flags, *data])
        seen = []
        trainer.model.vision_model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["pixel_values"].shape[-1]), with_kwargs=True
        )
        batch = prepare_batch(trainer, next(iter(trainer.get_train_dataloader())))
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
        assert seen == sides, "no dummy image in evaluation"
