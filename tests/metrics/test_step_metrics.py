"""Throughput, padding, FLOPs and MFU that runs of a tiny model report."""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    TRAIN_LLM_AND_PROJECTOR,
    build_run_flags,
    prepare_trainer,
    read_step_logs,
    run_training,
    run_training_until,
    train_in_process,
)

from internvl.metrics.device_peak import get_device_peak
from internvl.metrics.model_flops import count_model_flops
from internvl.metrics.step_metrics import METRICS_FILE, drop_metrics_after
from internvl.planning.epoch_plan import plan_epoch

PACKED = "--use_packed_ds True --max_packed_tokens 200 --num_images_expected 13".split()
PHASES = ["forward_seconds", "backward_seconds", "optimizer_seconds"]
RATES = ["tokens_per_second", "loss_tokens_per_second", "tiles_per_second", "tflops", "mfu_percent"]
STEP_METRICS = ["step_seconds", "padding_percent", "data_wait_percent", "peak_memory_gib", *PHASES, *RATES]


@pytest.fixture(autouse=True)
def share_cache(tiny_inputs, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / METRICS_FILE).read_text().splitlines()]


def sum_over_steps(entries: list[dict], rate: str) -> float:
    """Convert rates to amounts and add them up; entries report one step."""
    return sum(entry[rate] * entry["step_seconds"] for entry in entries)


def sum_planned_lengths(trainer, num_steps: int) -> dict[str, int]:
    """Add up tokens, loss tokens and tiles of epoch 0's first steps."""
    seen = trainer.schedule.plan(0).count_seen(num_steps, len(trainer.schedule.lengths))
    return {name: int((seen * trainer.schedule.lengths[name]).sum()) for name in trainer.schedule.lengths.dtype.names}


def check_entry(entry: dict) -> None:
    assert set(STEP_METRICS) <= entry.keys()
    assert all(math.isfinite(entry[name]) and entry[name] >= 0 for name in STEP_METRICS)
    assert all(entry[name] > 0 for name in (*PHASES, "tokens_per_second", "mfu_percent"))
    # The data wait is that of the rank that waited most, the phases are means over ranks.
    assert sum(entry[name] for name in PHASES) <= entry["step_seconds"] + 1e-9


@pytest.mark.parametrize("strict", ["True", "False"])
def test_packed_run_reports_the_amounts_of_its_plan(tiny_inputs, tmp_path, strict):
    output = tmp_path / "out"
    flags = [*PACKED, "--strict_mode", strict, "--gradient_accumulation_steps", "2", "--num_train_epochs", "1"]
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, output), *TRAIN_ADAPTERS, *flags, "--max_steps", "-1"])
    trainer.train()
    entries, plan, lengths = read_metrics(output), trainer.schedule.plan(0), trainer.schedule.lengths
    assert [entry["step"] for entry in entries] == list(range(1, len(plan) + 1))
    for entry in entries:
        check_entry(entry)
    plan_totals = sum_planned_lengths(trainer, len(plan))
    assert sum_over_steps(entries, "tokens_per_second") == pytest.approx(plan_totals["tokens"])
    assert sum_over_steps(entries, "loss_tokens_per_second") == pytest.approx(plan_totals["loss_tokens"])
    assert sum_over_steps(entries, "tiles_per_second") == pytest.approx(plan_totals["tiles"])
    tokens = np.append(plan.sum_per_row(lengths["tokens"]), 0)[plan.steps].sum(axis=(1, 2, 3))
    num_empty_rows = (plan.steps < 0).sum(axis=(1, 2, 3))  # each is filled with two tokens
    positions = 200 * plan.steps[0].size if strict == "True" else tokens + 2 * num_empty_rows
    assert [entry["padding_percent"] for entry in entries] == pytest.approx((100 * (1 - tokens / positions)).tolist())

    # FLOPs by hand, from the samples of the plan.
    flops = count_model_flops(trainer.model)
    seen = plan.count_seen(len(plan), len(lengths))
    documents = np.repeat(lengths["tokens"], seen).tolist()
    assert sum_over_steps(entries, "tflops") * 1e12 == pytest.approx(
        flops.count(documents, plan_totals["loss_tokens"], plan_totals["tiles"])
    )
    assert trainer.state.total_flos == pytest.approx(sum_over_steps(entries, "tflops") * 1e12)
    peak, _ = get_device_peak(torch.device("cpu"), torch.float32)
    assert all(entry["mfu_percent"] == pytest.approx(100 * 1e12 * entry["tflops"] / peak) for entry in entries)


def test_padding_of_padded_batches_is_counted_by_documents(tiny_inputs, tmp_path):
    output = tmp_path / "out"
    flags = ["--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "1", "--max_steps", "3"]
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, output), *TRAIN_ADAPTERS, *flags, "--logging_steps", "3"])
    trainer.train()
    (entry,) = read_metrics(output)
    assert entry["step"] == 3
    tokens = np.array(trainer.schedule.lengths["tokens"])
    rows = [
        [tokens[trainer.schedule.plan(0).get_row_samples(row)].sum() for row in step]
        for step in trainer.schedule.plan(0).steps[:3, 0, 0]
    ]
    positions = sum(3 * max(row) for row in rows)
    assert entry["padding_percent"] == pytest.approx(100 * (1 - sum(map(sum, rows)) / positions)) != 0
    assert 3 * sum_over_steps([entry], "tokens_per_second") == pytest.approx(sum(map(sum, rows)))


@pytest.mark.multiprocess
def test_ranks_are_summed_and_resumed_runs_repeat_no_line(tiny_inputs, tmp_path):
    """Killed after a checkpoint, under ZeRO-2."""
    output = tmp_path / "out"
    flags = [*TRAIN_ADAPTERS, *PACKED, "--strict_mode", "False", "--gradient_accumulation_steps", "1"]
    flags += ["--save_steps", "2", "--max_steps", "4"]
    zero = ["--deepspeed", "zero_stage2_config.json"]
    run_training_until(output / "checkpoint-2", tiny_inputs, output, *flags, *zero, "--max_steps", "400", ranks=2)
    before = read_metrics(output)[:2]
    with (output / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    printed = run_training(tiny_inputs, output, *flags, *zero, ranks=2).stdout
    assert re.search(r"MFU reference peak: [\d.]+ TFLOPS in float32 on this CPU", printed)
    entries = read_metrics(output)
    assert entries[:2] == before and [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert [entry["loss"] for entry in read_step_logs(output)] == [entry["loss"] for entry in entries]
    for entry in entries:
        check_entry(entry)
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "one_rank"), *flags])
    lengths = trainer.schedule.lengths
    seen = plan_epoch(lengths, replace(trainer.schedule.layout, world_size=2), 0).count_seen(2, len(lengths))
    assert sum_over_steps(before, "tokens_per_second") == pytest.approx((seen * lengths["tokens"]).sum())
    assert sum_over_steps(before, "tiles_per_second") == pytest.approx((seen * lengths["tiles"]).sum())


def test_new_run_starts_a_new_metrics_file(tiny_inputs, tmp_path):
    flags = [*TRAIN_LLM_AND_PROJECTOR, "--max_steps", "1", "--overwrite_output_dir", "True", "--save_strategy", "no"]
    for _ in range(2):
        train_in_process(tiny_inputs, tmp_path, *flags)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_lines_of_repeated_steps_and_incomplete_lines_are_dropped(tmp_path):
    file = tmp_path / METRICS_FILE
    drop_metrics_after(file, 3)
    assert not file.exists()
    file.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    drop_metrics_after(file, 3)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_foreign_lines_are_kept(tmp_path, caplog):
    file = tmp_path / METRICS_FILE
    foreign = [b"# a note", b"[1]", b'{"loss": 1}', b'{"step": "x"}', b"\xff\xfe", b"[" * 100_000, b""]
    lines = [b'{"step": 1}', *foreign, b'{"step": 2}', b'{"step": 9}']
    file.write_bytes(b"\n".join(lines) + b"\n")
    drop_metrics_after(file, 3)
    assert file.read_bytes() == b"\n".join(lines[:-1]) + b"\n"
    assert "has 7 lines that are no metrics of a step" in caplog.text
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(OSError, match="metrics.jsonl is a FIFO, not a regular file"):
        drop_metrics_after(file, 3)
