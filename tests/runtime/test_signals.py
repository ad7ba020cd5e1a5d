"""Preemption signals end a run after a step, with a checkpoint.

It names the checkpoint to resume from and exits with status 85.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.live_runs import count_logged_steps, wait_until
from helpers.paths import FINETUNE_PROGRAM, PACKAGE_DIR
from helpers.training_runs import TRAIN_ADAPTERS, build_launch_command, load_weights, read_losses, run_training

from internvl.arguments.training import parse_args
from internvl.checkpoint.manifest import find_latest_valid_checkpoint
from internvl.runtime.signals import PREEMPTED_EXIT_STATUS
from internvl.train.graceful_stop import GracefulStop

STEPS = ["--max_steps", "40", "--save_steps", "1000", "--save_total_limit", "1"]


def start(tiny_inputs: Path, output: Path, *flags: str, ranks: int, entry: Path = FINETUNE_PROGRAM) -> subprocess.Popen:
    """Start a run in a new process group; it prints to `log_path(output)`."""
    command, env = build_launch_command(tiny_inputs, output, *flags, ranks=ranks, entry=entry)
    with log_path(output).open("w") as log:
        return subprocess.Popen(
            command, env=env | {"PYTHONUNBUFFERED": "1"}, stdout=log, stderr=log, start_new_session=True
        )


def log_path(output: Path) -> Path:
    return output.with_suffix(".log")


def wait_for_steps(num_steps: int, process: subprocess.Popen, output: Path) -> None:
    def read_log() -> str:
        return log_path(output).read_text()

    wait_until(lambda: count_logged_steps(read_log()) >= num_steps, lambda: read_log()[-3000:], processes=[process])


def list_ranks(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


# -- one process -------------------------------------------------------------------------------------------------------

# While `busy`, the main thread is in one C call for 3 seconds, which no signal interrupts.
PROCESS = """
import ctypes, multiprocessing, os, signal, sys, time
from internvl.runtime.signals import ignore_first_sigterm, preemption
def busy():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    print("ready", flush=True)
    ctypes.CDLL(None).usleep(3_000_000)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, range(1, 32))
"""
BEFORE_TRAINING = "preemption.listen(); busy(); sys.exit(3)"
TRAINING = "preemption.listen(); preemption.resume_hint = 'resume'; preemption.start_training({seconds}); busy(); "
TRAINING += "busy() if {twice} else 0; sys.exit(7 if preemption.signal else 3)"
WITH_CHILD = """
def run_child():
    ignore_first_sigterm(0); print(os.getpid(), flush=True); time.sleep(2); os._exit(3)
preemption.listen(); preemption.start_training(0)
child = multiprocessing.get_context("fork").Process(target=run_child); child.start(); child.join()
sys.exit(7 if preemption.signal else 128 + abs(child.exitcode) if child.exitcode < 0 else child.exitcode)
"""

# name -> program, signals, exit status, part of the output
CASES = {
    "before the first step": (
        BEFORE_TRAINING,
        [signal.SIGUSR1],
        PREEMPTED_EXIT_STATUS,
        "SIGUSR1 received before the first step: nothing to save",
    ),
    "SIGTERM is recorded": (TRAINING.format(seconds=0, twice=0), [signal.SIGTERM], 7, ""),
    "Ctrl-C is recorded": (TRAINING.format(seconds=0, twice=0), [signal.SIGINT], 7, ""),
    "Ctrl-C twice": (
        TRAINING.format(seconds=0, twice=1),
        [signal.SIGINT] * 2,
        130,
        "SIGINT received again: exiting without saving",
    ),
    "time limit": (
        TRAINING.format(seconds=1, twice=0),
        [signal.SIGTERM],
        PREEMPTED_EXIT_STATUS,
        "SIGTERM: --save_on_signal_seconds 1 elapsed",
    ),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize(("program", "signals", "status", "message"), CASES.values(), ids=CASES)
def test_signals_reach_a_process_that_is_busy_outside_python(program, signals, status, message):
    process = start_python(PROCESS + program)
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(1.2 if len(signals) > 1 else 0)
    printed = process.communicate(timeout=20)[0]
    assert process.returncode == status, printed
    assert message in printed and ("(exit status" in printed) == bool(message)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("signals", "status"), [([signal.SIGUSR1, signal.SIGINT, signal.SIGTERM], 3), ([signal.SIGTERM] * 2, 128 + 15)]
)
def test_a_dataloader_worker_ends_on_the_second_sigterm(signals, status):
    process = start_python(PROCESS + WITH_CHILD)
    child = int(process.stdout.readline())
    for number in signals:
        os.kill(child, number)
        time.sleep(0.3)
    assert process.wait(20) == status, "7: the parent recorded a signal that was sent to its child"


def start_python(program: str) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(PACKAGE_DIR)}
    return subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)


INVALID_FLAGS = {
    "--save_on_signal_seconds -1": "--save_on_signal_seconds -1.0 is invalid: expected a number from 0",
    "--save_on_signal_seconds nan": "--save_on_signal_seconds nan is invalid: expected a number from 0",
    "--max_skipped_steps -1": "--max_skipped_steps -1 is invalid: expected an integer from 0",
    "--skip_above_grad_norm 0": "--skip_above_grad_norm 0.0 is invalid: expected a number > 0",
}


@pytest.mark.parametrize(("flags", "message"), INVALID_FLAGS.items(), ids=INVALID_FLAGS)
def test_invalid_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_args(["--output_dir", "x", *flags.split()])


def test_a_checkpoint_that_would_not_be_complete_in_time_is_not_started(caplog):
    graceful_stop = GracefulStop(SimpleNamespace(save_seconds=10.0), max_seconds=30)
    assert graceful_stop.has_time_to_save(seconds_since_signal=19) and not caplog.records
    assert not graceful_stop.has_time_to_save(seconds_since_signal=21.5)
    assert "8.5 of the 30 s of --save_on_signal_seconds are left, saving takes 10.0 s" in caplog.text


# -- before the first step ---------------------------------------------------------------------------------------------


def does_sigterm_wait(pid: int) -> bool:
    """Check whether a process blocks or catches SIGTERM: before, it just ends, as any Python."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigBlk:", "SigCgt:"))]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("seconds", "ranks", "program"), [(0, 1, "finetune"), (0, 2, "mpo"), (2, 1, "pretrain"), (4, 2, "finetune")]
)
def test_a_signal_before_the_first_step_saves_nothing(tiny_inputs, tmp_path, seconds, ranks, program):
    """As soon as the program, or torchrun, holds signals back or handles them; later torch is imported."""
    output, entry = tmp_path / "out", FINETUNE_PROGRAM.with_name(f"internvl_chat_{program}.py")
    process = start(tiny_inputs, output, *TRAIN_ADAPTERS, *STEPS, ranks=ranks, entry=entry)
    wait_until(lambda: does_sigterm_wait(process.pid), log_path(output).read_text, processes=[process])
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == PREEMPTED_EXIT_STATUS, log_path(output).read_text()
    assert not list(output.glob("checkpoint-*"))


# -- in training -------------------------------------------------------------------------------------------------------


def send_to_rank_1(process: subprocess.Popen) -> None:
    list_ranks(process)[1].send_signal(signal.SIGUSR1)


def send_to_torchrun(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)


def send_to_all(process: subprocess.Popen) -> None:
    """Send a signal as SLURM does to every process of a job."""
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        one.send_signal(signal.SIGTERM)


def send_to_group(process: subprocess.Popen) -> None:
    """Send a signal as Ctrl-C does to all processes of a terminal."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.fixture(scope="module")
def unbroken_run(tiny_inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("preemption") / "unbroken"
    run_training(tiny_inputs, output, *TRAIN_ADAPTERS, *STEPS, ranks=2)
    return output


@pytest.mark.multiprocess
def test_a_preempted_and_resumed_run_equals_an_unbroken_one(tiny_inputs, tmp_path, unbroken_run):
    output, step = tmp_path / "out", 0
    for send_fn in (send_to_rank_1, send_to_torchrun, send_to_all, send_to_group):
        save_often = ["--save_steps", "1"] if send_fn == send_to_torchrun else []  # the signal comes near a save
        process = start(
            tiny_inputs, output, *TRAIN_ADAPTERS, *STEPS, *save_often, "--dataloader_num_workers", "1", ranks=2
        )
        wait_for_steps(3, process, output)
        send_fn(process)
        if send_fn == send_to_torchrun:
            send_fn(process)  # a second signal while the run is stopping has no effect
        assert process.wait(60) == PREEMPTED_EXIT_STATUS, log_path(output).read_text()
        printed = log_path(output).read_text()
        (checkpoint,) = output.glob("checkpoint-*")
        previous_step, step = step, int(checkpoint.name.removeprefix("checkpoint-"))
        assert previous_step + 3 <= step < 40
        assert re.search(rf"after step {step}\b.*the same command \w+( on)? from {checkpoint.name}\b", printed)
        assert "Traceback" not in printed
    run_training(tiny_inputs, output, *TRAIN_ADAPTERS, *STEPS, ranks=2)
    assert read_losses(output) == read_losses(unbroken_run)
    ours, expected = load_weights(output), load_weights(unbroken_run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


@pytest.mark.multiprocess
def test_the_time_limit_ends_a_step_that_does_not_end(tiny_inputs, tmp_path):
    """Rank 1 is suspended in a step; the last checkpoint stays valid."""
    output = tmp_path / "out"
    flags = [*TRAIN_ADAPTERS, *STEPS, "--save_steps", "2", "--save_on_signal_seconds", "3"]
    process = start(tiny_inputs, output, *flags, ranks=2)
    wait_for_steps(3, process, output)
    suspended = list_ranks(process)[1]
    suspended.suspend()
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    read_log = log_path(output).read_text
    wait_until(lambda: "elapsed before" in read_log(), lambda: read_log()[-3000:], seconds=20, processes=[process])
    assert 2.5 < time.monotonic() - sent < 10
    suspended.resume()
    assert process.wait(60) == PREEMPTED_EXIT_STATUS, read_log()
    newest = find_latest_valid_checkpoint(output, print)
    message = rf"before a checkpoint was saved; the same command \w+( on)? from {newest.name} \(exit status 85\)"
    assert re.search(message, read_log())
