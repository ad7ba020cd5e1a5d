"""HF Trainer that leaves when it is told to: at the end of a step, with a checkpoint.

Between `checkpointing.py` and `skipping.py`; `preemption.py` hears the signals.
"""

import logging
import signal
import time

import torch
import torch.distributed as dist

from internvl.dist_utils import world_size
from internvl.train.checkpointing import CheckpointingTrainer
from internvl.train.preemption import preemption

logger = logging.getLogger(__name__)


class StoppingTrainer(CheckpointingTrainer):
    """Trains until the end, or until a signal comes to any rank."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stopped = False  # before the end, by a signal
        self.votes: dist.ProcessGroup | None = None  # on CPUs: asking the others does not wait for a device

    def _prepare_for_training(self, *args):
        prepared = super()._prepare_for_training(*args)
        if world_size() > 1:
            self.votes = dist.new_group(backend="gloo")
        self.saved_step = self.state.global_step  # more than 0 only where the run goes on from a checkpoint
        self.tell_where_to_go_on()
        preemption.begin(self.args.save_on_signal_seconds)
        return prepared

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """At the end of each step, and of each epoch."""
        last = self.control.should_training_stop
        if not last and self.told_to_stop():
            self.stopped = True
            self.control.should_save = self.time_is_enough()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.stopped and not last:
            self.control.should_training_stop = True  # behind the save: whoever goes on does not stop
            logger.warning("%s: leaving after step %d; %s", preemption.signal.name, self.state.global_step, self.where)
        if self.control.should_training_stop:
            preemption.end()

    def told_to_stop(self) -> bool:
        """Whether any rank was; a collective of four numbers on CPUs.

        All ranks know then which signal it was, when it came, and how long a checkpoint takes.
        """
        told = preemption.signal or 0
        mine = torch.tensor([told, preemption.waited, self.seconds_to_save], dtype=torch.float64)
        if self.votes:
            dist.all_reduce(mine, dist.ReduceOp.MAX, group=self.votes)
        number, waited, self.seconds_to_save = mine.tolist()
        if number and not told:
            preemption.note(signal.Signals(int(number)), time.monotonic() - waited)
        self.waited = waited
        return number > 0

    def time_is_enough(self) -> bool:
        bound = self.args.save_on_signal_seconds
        enough = not bound or self.waited + self.seconds_to_save < bound
        if not enough and self.saved_step != self.state.global_step:
            logger.warning(
                "%.1f of the %g s of --save_on_signal_seconds are left, a checkpoint takes %.1f s: none is written",
                *(max(0.0, bound - self.waited), bound, self.seconds_to_save),
            )
        return enough

    def _save_checkpoint(self, model, trial) -> None:
        if self.saved_step != self.state.global_step:
            super()._save_checkpoint(model, trial)
        self.tell_where_to_go_on()

    def tell_where_to_go_on(self) -> None:
        name = f"checkpoint-{self.saved_step}" if self.saved_step else "the beginning"
        self.where = preemption.goes_on_from = f"the same command goes on from {name}"
