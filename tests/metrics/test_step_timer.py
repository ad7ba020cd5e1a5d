"""What a run reports of its speed, from real runs on a tiny checkpoint."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training_runs import FULL, LORA, flags_of, history, prepare, run, run_here, run_until

from internvl.metrics.comm_profiler import covered_length
from internvl.metrics.device_peak import DEVICE_PEAKS, device_peak, lookup_peak
from internvl.metrics.model_flops import model_flops
from internvl.metrics.step_timer import StepTimer, drop_metrics_after
from internvl.planning.epoch_plan import plan_epoch
from internvl.train.trainer_metered import METRICS_FILE

PACKED = "--use_packed_ds True --max_packed_tokens 200 --num_images_expected 13".split()
ALWAYS = """step_seconds tokens_per_second trained_tokens_per_second tiles_per_second padding_percent data_wait_percent
    forward_seconds backward_seconds optimizer_seconds peak_memory_gib tflops mfu_percent""".split()
PHASES = ("forward_seconds", "backward_seconds", "optimizer_seconds")


@pytest.fixture(autouse=True)
def cache(tiny, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / METRICS_FILE).read_text().splitlines()]


def total(entries: list[dict], rate: str) -> float:
    """What a rate stands for, over reports of one step each."""
    return sum(entry[rate] * entry["step_seconds"] for entry in entries)


def planned(trainer, steps: int) -> dict[str, int]:
    """Tokens, trained tokens and tiles in the first steps of epoch 0."""
    seen = trainer.schedule.plan(0).seen(steps, len(trainer.schedule.lengths.tokens))
    return {name: int((seen * values).sum()) for name, values in trainer.schedule.lengths._asdict().items()}


def check_line(entry: dict) -> None:
    assert set(ALWAYS) <= entry.keys()
    assert all(math.isfinite(entry[name]) and entry[name] >= 0 for name in ALWAYS)
    assert all(entry[name] > 0 for name in (*PHASES, "tokens_per_second", "mfu_percent"))
    assert sum(entry[name] for name in PHASES) <= entry["step_seconds"] * (1 - entry["data_wait_percent"] / 100) + 1e-9


@pytest.mark.parametrize("strict", ["True", "False"])
def test_a_packed_run_reports_what_its_plan_says(tiny, tmp_path, strict):
    output = tmp_path / "out"
    flags = [*PACKED, "--strict_mode", strict, "--gradient_accumulation_steps", "2", "--num_train_epochs", "1"]
    trainer = prepare([*flags_of(tiny, output), *LORA, *flags, "--max_steps", "-1"])
    trainer.train()
    entries, plan, lengths = lines(output), trainer.schedule.plan(0), trainer.schedule.lengths
    assert [entry["step"] for entry in entries] == list(range(1, len(plan) + 1))
    for entry in entries:
        check_line(entry)
        assert "communication_seconds" not in entry
    said = planned(trainer, len(plan))
    assert total(entries, "tokens_per_second") == pytest.approx(said["tokens"])
    assert total(entries, "trained_tokens_per_second") == pytest.approx(said["trained"])
    assert total(entries, "tiles_per_second") == pytest.approx(said["tiles"])
    tokens = np.append(plan.totals(lengths.tokens), 0)[plan.steps].sum(axis=(1, 2, 3))
    empty = (plan.steps < 0).sum(axis=(1, 2, 3))  # rows of two tokens
    positions = 200 * plan.steps[0].size if strict == "True" else tokens + 2 * empty
    assert [entry["padding_percent"] for entry in entries] == pytest.approx((100 * (1 - tokens / positions)).tolist())

    # FLOPs by hand, from the samples of the plan.
    flops = model_flops(trainer.model)
    seen = plan.seen(len(plan), len(lengths.tokens))
    documents = np.repeat(lengths.tokens, seen).tolist()
    assert total(entries, "tflops") * 1e12 == pytest.approx(flops.of(documents, said["trained"], said["tiles"]))
    assert trainer.state.total_flos == pytest.approx(total(entries, "tflops") * 1e12)
    peak, _ = device_peak(torch.device("cpu"), torch.float32)
    assert all(entry["mfu_percent"] == pytest.approx(100 * 1e12 * entry["tflops"] / peak) for entry in entries)


def test_padding_of_a_padded_batch_is_told_by_its_documents(tiny, tmp_path):
    output = tmp_path / "out"
    flags = ["--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "1", "--max_steps", "3"]
    trainer = prepare([*flags_of(tiny, output), *LORA, *flags, "--logging_steps", "3"])
    trainer.train()
    (entry,) = lines(output)
    assert entry["step"] == 3
    tokens = np.array(trainer.schedule.lengths.tokens)
    rows = [
        [tokens[trainer.schedule.plan(0).row(row)].sum() for row in step]
        for step in trainer.schedule.plan(0).steps[:3, 0, 0]
    ]
    positions = sum(3 * max(row) for row in rows)
    assert entry["padding_percent"] == pytest.approx(100 * (1 - sum(map(sum, rows)) / positions)) != 0
    assert 3 * total([entry], "tokens_per_second") == pytest.approx(sum(map(sum, rows)))


def test_two_ranks_are_summed_and_go_on_without_a_step_twice(tiny, tmp_path):
    """Killed behind a checkpoint, under ZeRO-2; the time of communication is told when asked for."""
    output = tmp_path / "out"
    flags = [*LORA, *PACKED, "--strict_mode", "False", "--gradient_accumulation_steps", "1", "--save_steps", "2"]
    flags += ["--log_level", "debug", "--max_steps", "4"]
    zero = ["--deepspeed", "zero_stage2_config.json"]
    run_until(output / "checkpoint-2", tiny, output, *flags, *zero, "--max_steps", "400", ranks=2)
    before = lines(output)[:2]
    with (output / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    printed = run(tiny, output, *flags, *zero, ranks=2).stdout
    assert re.search(
        r"100 % MFU are [\d.]+ TFLOPS in float32 on this processor, by a matrix product, measured", printed
    )
    entries = lines(output)
    assert entries[:2] == before and [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert [entry["loss"] for entry in history(output)] == [entry["loss"] for entry in entries]
    for entry in entries:
        check_line(entry)
        assert 0 < entry["communication_seconds"] < 10 * entry["step_seconds"]
    alone = prepare([*flags_of(tiny, tmp_path / "alone"), *flags])
    lengths = alone.schedule.lengths
    seen = plan_epoch(lengths, replace(alone.schedule.layout, world_size=2), 0).seen(2, len(lengths.tokens))
    assert total(before, "tokens_per_second") == pytest.approx((seen * lengths.tokens).sum())
    assert total(before, "tiles_per_second") == pytest.approx((seen * lengths.tiles).sum())


def test_a_new_run_begins_a_new_file(tiny, tmp_path):
    flags = [*FULL, "--max_steps", "1", "--overwrite_output_dir", "True", "--save_strategy", "no"]
    for _ in range(2):
        run_here(tiny, tmp_path, *flags)
    assert [entry["step"] for entry in lines(tmp_path)] == [1]


def test_lines_that_will_come_again_and_broken_ones_are_dropped(tmp_path):
    file = tmp_path / METRICS_FILE
    drop_metrics_after(file, 3)
    assert not file.exists()
    file.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    drop_metrics_after(file, 3)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_phases_divide_the_time():
    watch = StepTimer(torch.device("cpu"))
    assert watch.take() == {}
    watch.mark("data")
    start = watch.marks[0][1]
    for phase in ("forward", "backward", "forward", "backward"):
        watch.mark(phase)
        np.linalg.inv(np.eye(200) + 1)
    seconds = watch.take()
    assert seconds.keys() == {"data", "forward", "backward"} and min(seconds.values()) > 0
    assert sum(seconds.values()) == pytest.approx(watch.marks[0][1] - start)
    assert watch.take().keys() == {"backward"}, "it goes on in the phase it was in"


def test_time_that_several_collectives_share_counts_once():
    assert covered_length([]) == 0
    assert covered_length([(5, 6), (0, 2), (1, 3), (1, 1.5), (3, 4)]) == 5


@pytest.mark.parametrize(
    ("name", "half", "tf32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA A800 80GB PCIe", 312, 156),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756.5, 378),
        ("NVIDIA H100 NVL", 835.5, 417.5),
        ("NVIDIA H800", 989.4, 494.7),
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA H20", 148, 74),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_devices_are_known_by_their_names(name, half, tf32):
    assert lookup_peak(name, torch.bfloat16) == lookup_peak(name, torch.float16) == half * 1e12
    assert lookup_peak(name, torch.float32, tf32=True) == tf32 * 1e12
    assert lookup_peak(name, torch.float32) < tf32 * 1e12 or name.endswith(("4090", "L40"))


def test_other_devices_are_measured():
    assert lookup_peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16) is None
    assert lookup_peak("Some Accelerator 9000", torch.bfloat16) is None
    assert all(half >= tf32 >= single for _, half, tf32, single in DEVICE_PEAKS)
    peak, sentence = device_peak(torch.device("cpu"), torch.float32)
    assert 1e9 < peak < 1e14 and sentence.endswith("by a matrix product, measured")
    assert device_peak(torch.device("cpu"), torch.float32) == (peak, sentence), "once a process"
