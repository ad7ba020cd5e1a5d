"""Signals: a run that is told to leave ends its step, saves, says where it can go on, and exits with status 85."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from runs import LORA, losses, run, started, weights

from internvl.train.preemption import PREEMPTED

STEPS = ["--max_steps", "40", "--save_steps", "1000", "--save_total_limit", "1"]


def start(tiny: Path, output: Path, *flags: str, ranks: int) -> subprocess.Popen:
    """A run in a process group of its own, with its output in a file beside its folder."""
    command, env = started(tiny, output, *flags, ranks=ranks)
    with open(log_of(output), "w") as log:
        return subprocess.Popen(
            command, env=env | {"PYTHONUNBUFFERED": "1"}, stdout=log, stderr=log, start_new_session=True
        )


def log_of(output: Path) -> Path:
    return output.with_suffix(".log")


def until(happened, process: subprocess.Popen, output: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None and time.monotonic() < end, log_of(output).read_text()[-3000:]
        time.sleep(0.02)


def steps_done(output: Path) -> int:
    return log_of(output).read_text().count("'grad_norm'")


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


# -- before the first step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seconds", [0.3, 4])
def test_before_the_first_step_there_is_nothing_to_save(tiny, tmp_path, ranks, seconds):
    """At 0.3 s Python itself starts, or torchrun; at 4 s torch is imported."""
    output = tmp_path / "out"
    process = start(tiny, output, *LORA, *STEPS, ranks=ranks)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == PREEMPTED, log_of(output).read_text()
    assert not list(output.glob("checkpoint-*"))


# -- in training -------------------------------------------------------------------------------------------------------


def to_rank_1(process: subprocess.Popen) -> None:
    ranks_of(process)[1].send_signal(signal.SIGUSR1)


def to_torchrun(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)


def to_all(process: subprocess.Popen) -> None:
    """As SLURM's signals reach every process of a job."""
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        one.send_signal(signal.SIGTERM)


def to_group(process: subprocess.Popen) -> None:
    """As Ctrl-C reaches the processes of a terminal."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("preemption") / "whole"
    run(tiny, output, *LORA, *STEPS, ranks=2)
    return output


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(tiny, tmp_path, whole):
    output, step = tmp_path / "out", 0
    for send in (to_rank_1, to_torchrun, to_all, to_group):
        process = start(tiny, output, *LORA, *STEPS, "--dataloader_num_workers", "1", ranks=2)
        until(lambda: steps_done(output) >= 3, process, output)
        send(process)
        assert process.wait(60) == PREEMPTED, log_of(output).read_text()
        printed = log_of(output).read_text()
        (last,) = output.glob("checkpoint-*")
        step, before = int(last.name.removeprefix("checkpoint-")), step
        assert before + 3 <= step < 40
        assert f"leaving after step {step}; the same command goes on from {last.name}" in printed
        assert "Traceback" not in printed
    run(tiny, output, *LORA, *STEPS, ranks=2)
    assert losses(output) == losses(whole)
    ours, theirs = weights(output), weights(whole)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
