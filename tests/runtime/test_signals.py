"""Signals: a run that is told to leave ends its step, saves, says where it can go on, and exits with status 85."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers.training_runs import ENTRY, LORA, ROOT, flags_of, losses, prepare, run, started, weights

from internvl.arguments.training import parse_args
from internvl.checkpoint.manifest import find_latest_valid_checkpoint
from internvl.runtime.signals import PREEMPTED_EXIT_STATUS

STEPS = ["--max_steps", "40", "--save_steps", "1000", "--save_total_limit", "1"]


def start(tiny: Path, output: Path, *flags: str, ranks: int, entry: Path = ENTRY) -> subprocess.Popen:
    """A run in a process group of its own, with its output in a file beside its folder."""
    command, env = started(tiny, output, *flags, ranks=ranks, entry=entry)
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


# -- one process -------------------------------------------------------------------------------------------------------

# A process as a run makes them, around `busy`: its main thread is in one call of C for 3 seconds, which no signal ends.
PROCESS = """
import ctypes, multiprocessing, os, signal, sys, time
from internvl.runtime.signals import outlive_first_signal, preemption
def busy():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    print("ready", flush=True)
    ctypes.CDLL(None).usleep(3_000_000)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, range(1, 32))
"""
FIRST = "preemption.listen(); busy(); sys.exit(3)"
TRAINING = "preemption.listen(); preemption.goes_on_from = 'go on'; preemption.begin({bound}); busy(); "
TRAINING += "busy() if {again} else 0; sys.exit(7 if preemption.signal else 3)"
CHILD = """
def child():
    outlive_first_signal(0); print(os.getpid(), flush=True); time.sleep(2); os._exit(3)
preemption.listen(); preemption.begin(0)
one = multiprocessing.get_context("fork").Process(target=child); one.start(); one.join()
sys.exit(7 if preemption.signal else 128 + abs(one.exitcode) if one.exitcode < 0 else one.exitcode)
"""

ALONE = {
    "before the first step, at once": (
        FIRST,
        [signal.SIGUSR1],
        PREEMPTED_EXIT_STATUS,
        "SIGUSR1 before the first step: nothing to",
    ),
    "in training, noted": (TRAINING.format(bound=0, again=0), [signal.SIGTERM], 7, ""),
    "Ctrl-C in training, noted": (TRAINING.format(bound=0, again=0), [signal.SIGINT], 7, ""),
    "Ctrl-C once more": (TRAINING.format(bound=0, again=1), [signal.SIGINT] * 2, 130, "SIGINT again: leaving without"),
    "out of time": (
        TRAINING.format(bound=1, again=0),
        [signal.SIGTERM],
        PREEMPTED_EXIT_STATUS,
        "SIGTERM: the 1 s of --save_on_s",
    ),
}


@pytest.mark.parametrize(("program", "signals", "status", "sentence"), ALONE.values(), ids=ALONE)
def test_a_process_that_is_busy_outside_of_python(program, signals, status, sentence):
    process = started_with(PROCESS + program)
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(1.2 if len(signals) > 1 else 0)
    printed = process.communicate(timeout=20)[0]
    assert process.returncode == status, printed
    assert sentence in printed and ("(exit status" in printed) == bool(sentence)


@pytest.mark.parametrize(
    ("signals", "status"), [([signal.SIGUSR1, signal.SIGINT, signal.SIGTERM], 3), ([signal.SIGTERM] * 2, 128 + 15)]
)
def test_a_worker_of_a_dataloader_lives_until_it_is_told_twice(signals, status):
    process = started_with(PROCESS + CHILD)
    child = int(process.stdout.readline())
    for number in signals:
        os.kill(child, number)
        time.sleep(0.3)
    assert process.wait(20) == status, "and the signals of a child are not its parent's"


def started_with(program: str) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT / "internvl_chat")}
    return subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)


FLAGS = {
    "--save_on_signal_seconds -1": "--save_on_signal_seconds -1.0 must be 0 or more seconds",
    "--save_on_signal_seconds nan": "--save_on_signal_seconds nan must be 0 or more seconds",
    "--max_skipped_steps -1": "--max_skipped_steps -1 must be 0 or more",
    "--skip_above_grad_norm 0": "--skip_above_grad_norm 0.0 must be positive",
}


@pytest.mark.parametrize(("flags", "message"), FLAGS.items(), ids=FLAGS)
def test_flags_that_cannot_be_used(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_args(["--output_dir", "x", *flags.split()])


def test_a_checkpoint_for_which_there_is_no_time_is_not_begun(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    trainer = prepare([*flags_of(tiny, tmp_path / "out"), *LORA, "--save_on_signal_seconds", "30"])
    trainer.seconds_to_save, trainer.state.global_step = 10.0, 3
    assert trainer.time_is_enough(waited=19) and not caplog.records
    assert not trainer.time_is_enough(waited=21.5)
    assert (
        "8.5 of the 30 s of --save_on_signal_seconds are left, a checkpoint takes 10.0 s: none is writt" in caplog.text
    )


# -- before the first step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "ranks", "program"), [(0.3, 1, "finetune"), (0.3, 2, "mpo"), (2, 1, "pretrain"), (4, 2, "finetune")]
)
def test_before_the_first_step_there_is_nothing_to_save(tiny, tmp_path, seconds, ranks, program):
    """At 0.3 s Python itself starts, or torchrun; later torch is imported. Every program listens."""
    output, entry = tmp_path / "out", ENTRY.with_name(f"internvl_chat_{program}.py")
    process = start(tiny, output, *LORA, *STEPS, ranks=ranks, entry=entry)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == PREEMPTED_EXIT_STATUS, log_of(output).read_text()
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
        often = ["--save_steps", "1"] if send == to_torchrun else []  # the signal comes in a save, or near one
        process = start(tiny, output, *LORA, *STEPS, *often, "--dataloader_num_workers", "1", ranks=2)
        until(lambda: steps_done(output) >= 3, process, output)
        send(process)
        if send == to_torchrun:
            send(process)  # once more, while it leaves: no harm
        assert process.wait(60) == PREEMPTED_EXIT_STATUS, log_of(output).read_text()
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


@pytest.mark.slow
def test_a_step_that_takes_longer_than_there_is_time(tiny, tmp_path):
    """Rank 1 stands still, so that the step does not end: the run does, with what was whole before."""
    output = tmp_path / "out"
    flags = [*LORA, *STEPS, "--save_steps", "2", "--save_on_signal_seconds", "3"]
    process = start(tiny, output, *flags, ranks=2)
    until(lambda: steps_done(output) >= 3, process, output)
    still = ranks_of(process)[1]
    still.suspend()
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    until(lambda: "are over" in log_of(output).read_text(), process, output, seconds=20)
    assert 2.5 < time.monotonic() - sent < 10
    still.resume()
    assert process.wait(60) == PREEMPTED_EXIT_STATUS, log_of(output).read_text()
    newest = find_latest_valid_checkpoint(output, tell=print)
    assert (
        f"before a checkpoint is whole; the same command goes on from {newest.name} (exit status 85)"
        in log_of(output).read_text()
    )
