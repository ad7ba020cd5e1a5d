"""Stop a run after a step if any rank received a signal, or cannot read its next batch.

`runtime/signals.py` receives the signals of this process. Here the ranks combine them and stop after the same step.
"""

import logging
import signal
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import TrainerControl

from internvl.checkpoint.manager import CheckpointManager
from internvl.dist_utils import get_world_size
from internvl.runtime.signals import preemption

logger = logging.getLogger(__name__)


class StoppedBySignalError(Exception):
    """Any rank received a preemption signal; raised on all ranks."""


class RunStatus(NamedTuple):
    """Maximum of each value over all ranks; the same on each rank."""

    signal_number: int  # 0 without a signal
    seconds_since_signal: float
    is_output_dir_missing: bool
    is_data_missing: bool


class GracefulStop:
    """Handler of preemption signals: saves a checkpoint and stops the training loop.

    Args:
        max_seconds: `--save_on_signal_seconds`, from the signal to the exit of the process; 0 for no limit.
        max_data_wait: seconds after the signal that a step may wait for data.

    Attributes:
        has_stopped: whether the run was stopped before its end.
    """

    def __init__(self, checkpoints: CheckpointManager, max_seconds: float, max_data_wait: float = 60.0):
        self.checkpoints, self.max_seconds, self.max_data_wait = checkpoints, max_seconds, max_data_wait
        self.has_stopped = False
        self._reason = ""  # of the stop
        self._group: dist.ProcessGroup | None = None

    def begin(self, timeout: timedelta | None = None) -> None:
        """Start to handle signals at the end of steps. A collective.

        Args:
            timeout: how long ranks wait for each other; default: torch's.
        """
        if get_world_size() > 1:
            # gloo on CPUs: the reduction in each step does not synchronize with the device.
            group: Any = dist.new_group(backend="gloo", timeout=timeout)
            self._group = group
        preemption.resume_hint = self.checkpoints.resume_hint
        preemption.start_training(self.max_seconds, self.max_data_wait)

    def end(self) -> None:
        """Ignore signals after the last checkpoint."""
        preemption.ignore_further_signals()

    def end_step(
        self, step: int, control: TrainerControl, folders: Iterable[Path], is_data_missing: bool = False
    ) -> None:
        """Save and stop after a signal or an outage; restore a removed output folder.

        A collective.

        Args:
            folders: created again, together with the output folder, if that was removed.
            is_data_missing: whether this rank cannot read its next batch, because a store does not answer.
        """
        is_last_step = control.should_training_stop
        status = self._combine_ranks(is_data_missing)
        if status.is_output_dir_missing:
            self._recreate_output_dir(folders)
            control.should_save = True
        if (status.signal_number or status.is_data_missing) and not is_last_step:
            self._request_stop(step, control, status)

    def check_signals(self) -> None:
        """Raise StoppedBySignalError after a signal, during work between two steps. A collective."""
        if self._combine_ranks(False).signal_number:
            raise StoppedBySignalError

    def stop_between_steps(self, step: int, control: TrainerControl) -> None:
        """Save and stop after `check_signals` has raised. A collective."""
        self._request_stop(step, control, self._combine_ranks(False))

    def _request_stop(self, step: int, control: TrainerControl, status: RunStatus) -> None:
        signal_name = signal.Signals(status.signal_number).name if status.signal_number else ""
        self._reason = signal_name or "a store does not answer"
        self.has_stopped = True
        control.should_save = self.has_time_to_save(status.seconds_since_signal)
        control.should_evaluate = False
        if not control.should_save:
            self._stop(step, control)

    def end_save(self, step: int, control: TrainerControl) -> None:
        """Stop a preempted run after its checkpoint.

        Not earlier, because the checkpoint contains `control`: the resumed run would stop as well.
        """
        preemption.resume_hint = self.checkpoints.resume_hint
        if self.has_stopped:
            self._stop(step, control)

    def _stop(self, step: int, control: TrainerControl) -> None:
        control.should_training_stop = True
        logger.warning("Stopping after step %d (%s): %s", step, self._reason, self.checkpoints.resume_hint)

    def _combine_ranks(self, is_data_missing: bool) -> RunStatus:
        """Combine the status of all ranks; record a signal of another one."""
        own_signal = preemption.signal or 0
        is_missing = self.checkpoints.is_writer and not self.checkpoints.output_dir.is_dir()
        values = [own_signal, preemption.seconds_since_signal, self.checkpoints.save_seconds]
        values += [is_missing, is_data_missing]
        numbers = torch.tensor(values, dtype=torch.float64)
        if self._group:
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        number, seconds_since_signal, save_seconds, is_missing, is_data_missing = numbers.tolist()
        if number and not own_signal:
            preemption.record_signal(signal.Signals(int(number)), time.monotonic() - seconds_since_signal)
        self.checkpoints.save_seconds = save_seconds  # of the slowest rank, so all ranks decide alike
        return RunStatus(int(number), seconds_since_signal, bool(is_missing), bool(is_data_missing))

    def has_time_to_save(self, seconds_since_signal: float) -> bool:
        """Check that a checkpoint can be saved within `max_seconds`."""
        save_seconds = self.checkpoints.save_seconds
        has_time = not self.max_seconds or seconds_since_signal + save_seconds < self.max_seconds
        if not has_time:
            logger.warning(
                "No checkpoint: %.1f of the %g s of --save_on_signal_seconds are left, saving takes %.1f s",
                *(max(0.0, self.max_seconds - seconds_since_signal), self.max_seconds, save_seconds),
            )
        return has_time

    def _recreate_output_dir(self, folders: Iterable[Path]) -> None:
        self.checkpoints.recreate_output_dir()
        if self.checkpoints.is_writer:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
        preemption.resume_hint = self.checkpoints.resume_hint
        logger.warning(
            "%s was removed while the run was writing to it: creating it again and saving a checkpoint now",
            self.checkpoints.output_dir,
        )
