"""Graceful stop in one process: save after a signal, then stop.

`tests/runtime/test_signals.py` sends real signals to runs of several ranks.
"""

import shutil
import signal
import time

import pytest
from transformers import TrainerControl

from internvl.checkpoint.manager import CheckpointManager
from internvl.runtime.signals import PreemptionListener
from internvl.train import graceful_stop
from internvl.train.graceful_stop import GracefulStop


@pytest.fixture
def listener(monkeypatch):
    """Replace the listener of this process by a new one."""
    listener = PreemptionListener()
    monkeypatch.setattr(graceful_stop, "preemption", listener)
    yield listener
    listener.ignore_further_signals()  # its time limit must not end the process that runs the tests


@pytest.fixture
def checkpoints(tmp_path) -> CheckpointManager:
    (tmp_path / "out").mkdir()
    return CheckpointManager(tmp_path / "out", is_writer=True)


def begin(checkpoints: CheckpointManager, max_seconds: float = 0) -> GracefulStop:
    stop = GracefulStop(checkpoints, max_seconds)
    stop.begin()
    return stop


def end_step(stop: GracefulStop, step: int, folders=(), **control_flags) -> TrainerControl:
    """End a step as the trainer does; return the loop's control."""
    control = TrainerControl(**control_flags)
    stop.end_step(step, control, folders)
    return control


def save_checkpoint(stop: GracefulStop, step: int, control: TrainerControl) -> None:
    """Save a checkpoint as the trainer does after `end_step`."""
    with stop.checkpoints.writing(step):
        (stop.checkpoints.unfinished_dir / f"checkpoint-{step}").mkdir(parents=True)
    stop.end_save(step, control)


def test_run_without_a_signal_continues(listener, checkpoints):
    stop = begin(checkpoints)
    assert listener.is_training, "signals are recorded from now on"
    assert listener.resume_hint == "the same command starts from the beginning"
    control = end_step(stop, 1)
    assert not control.should_save and not control.should_training_stop
    control = end_step(stop, 2, should_save=True)
    save_checkpoint(stop, 2, control)
    assert control.should_save and not control.should_training_stop and not stop.has_stopped
    assert listener.resume_hint == "the same command resumes from checkpoint-2"
    stop.end()
    assert listener.is_finished


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signal_saves_a_checkpoint_and_then_stops_the_loop(listener, checkpoints, caplog, number):
    stop = begin(checkpoints)
    listener.record_signal(number, time.monotonic())
    control = end_step(stop, 3)
    assert stop.has_stopped and control.should_save
    # A checkpoint stores `control`: a run that resumes from it must not stop.
    assert not control.should_training_stop
    save_checkpoint(stop, 3, control)
    assert control.should_training_stop
    assert f"Stopping after step 3 ({number.name}): the same command resumes from checkpoint-3" in caplog.messages


def test_run_without_time_to_save_stops_at_once(listener, checkpoints, caplog):
    stop = begin(checkpoints, max_seconds=60)
    save_checkpoint(stop, 2, TrainerControl())
    checkpoints.save_seconds = 45.0
    listener.record_signal(signal.SIGTERM, time.monotonic() - 20)
    control = end_step(stop, 3, should_save=True)
    assert stop.has_stopped and control.should_training_stop and not control.should_save
    no_checkpoint, stopping = caplog.messages
    assert no_checkpoint == (
        "No checkpoint: 40.0 of the 60 s of --save_on_signal_seconds are left, saving takes 45.0 s"
    )
    assert stopping == "Stopping after step 3 (SIGTERM): the same command resumes from checkpoint-2"


@pytest.mark.parametrize(
    ("max_seconds", "seconds_since_signal", "save_seconds", "has_time"),
    [(60, 20, 39, True), (60, 20, 40, False), (60, 70, 0, False), (0, 1000, 1000, True)],
)
def test_time_to_save_depends_on_the_last_save(
    listener, checkpoints, max_seconds, seconds_since_signal, save_seconds, has_time
):
    checkpoints.save_seconds = save_seconds
    assert GracefulStop(checkpoints, max_seconds).has_time_to_save(seconds_since_signal) == has_time


def test_removed_output_folder_is_created_again_and_saved_to(listener, checkpoints, caplog):
    stop = begin(checkpoints)
    save_checkpoint(stop, 2, TrainerControl())
    output_dir = checkpoints.output_dir
    shutil.rmtree(output_dir)
    control = end_step(stop, 3, folders=[output_dir / "runs/tensorboard"])
    assert control.should_save and not control.should_training_stop and not stop.has_stopped
    assert (output_dir / "runs/tensorboard").is_dir()
    assert caplog.messages == [
        f"{output_dir} was removed while the run was writing to it: creating it again and saving a checkpoint now"
    ]
    assert listener.resume_hint == "the same command starts from the beginning", "checkpoint-2 is lost"


def test_signal_during_the_last_step_changes_nothing(listener, checkpoints, caplog):
    stop = begin(checkpoints, max_seconds=60)
    listener.record_signal(signal.SIGTERM, time.monotonic())
    for should_save in (True, False):
        control = end_step(stop, 6, should_training_stop=True, should_save=should_save)
        assert control.should_training_stop and control.should_save == should_save
    save_checkpoint(stop, 6, control)
    assert not stop.has_stopped and not caplog.messages
