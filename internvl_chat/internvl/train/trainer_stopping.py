"""HF Trainer that leaves when it is told to, at the end of a step and with a checkpoint, and outlives a lost folder.

Between `checkpointing.py` and `skipping.py`; `preemption.py` hears the signals.
"""

import logging
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from internvl.dist_utils import world_size
from internvl.runtime.signals import preemption
from internvl.train.trainer_checkpoint import CheckpointingTrainer

logger = logging.getLogger(__name__)


class StoppingTrainer(CheckpointingTrainer):
    """Trains until the end, or until a signal comes to any rank."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stopped = False  # before the end, by a signal
        self.votes: dist.ProcessGroup | None = None  # on CPUs: asking the others does not wait for a device
        self.where = ""  # where the run goes on when it is started again

    def _prepare_for_training(self, *args):
        prepared = super()._prepare_for_training(*args)
        if world_size() > 1:
            self.votes = dist.new_group(backend="gloo")
        self.saved_step = self.state.global_step  # more than 0 only where the run goes on from a checkpoint
        self.tell_where_to_go_on()
        self.make_folders()
        preemption.begin(self.args.save_on_signal_seconds)
        return prepared

    # -- step --------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """At the end of each step, and of each epoch."""
        last = self.control.should_training_stop
        number, waited, self.seconds_to_save, gone = self.most_of_all_ranks()
        if gone:
            self.save_what_there_is()
        if number and not last:
            self.stopped = True
            self.control.should_save = self.time_is_enough(waited)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.stopped and not last:
            self.control.should_training_stop = True  # behind the save: whoever goes on does not stop
            logger.warning("%s: leaving after step %d; %s", preemption.signal.name, self.state.global_step, self.where)
        if self.control.should_training_stop:
            preemption.end()

    def most_of_all_ranks(self) -> tuple[float, float, float, float]:
        """The signal that came to any rank, seconds since it came, seconds that a checkpoint takes, whether the output
        folder is gone; the same on all ranks. A collective of four numbers on CPUs."""
        told, gone = preemption.signal or 0, self.args.should_save and not Path(self.args.output_dir).is_dir()
        numbers = torch.tensor([told, preemption.waited, self.seconds_to_save, gone], dtype=torch.float64)
        if self.votes:
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.votes)
        number, waited, *others = numbers.tolist()
        if number and not told:
            preemption.note(signal.Signals(int(number)), time.monotonic() - waited)
        return number, waited, *others

    def time_is_enough(self, waited: float) -> bool:
        bound = self.args.save_on_signal_seconds
        enough = not bound or waited + self.seconds_to_save < bound
        if not enough and self.saved_step != self.state.global_step:
            logger.warning(
                "%.1f of the %g s of --save_on_signal_seconds are left, a checkpoint takes %.1f s: none is written",
                *(max(0.0, bound - waited), bound, self.seconds_to_save),
            )
        return enough

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_what_there_is(self) -> None:
        self.make_folders()
        self.saved_step, self.control.should_save = 0, True
        self.tell_where_to_go_on()
        logger.warning(
            "%s was removed while the run was writing to it: it is made again, and a checkpoint is saved now",
            self.args.output_dir,
        )

    def make_folders(self) -> None:
        if self.args.should_save:
            writers = filter(None, (getattr(one, "tb_writer", None) for one in self.callback_handler.callbacks))
            for folder in (self.args.output_dir, *(writer.get_logdir() for writer in writers)):
                Path(folder).mkdir(parents=True, exist_ok=True)

    def _save_checkpoint(self, model, trial) -> None:
        if self.saved_step != self.state.global_step:
            try:
                super()._save_checkpoint(model, trial)
            except OSError as error:
                raise OSError(f"{error}; {self.free_space()}; {self.where} when that is mended") from error
        self.tell_where_to_go_on()

    def free_space(self) -> str:
        try:
            return f"{shutil.disk_usage(self.args.output_dir).free:,} bytes are free there"
        except OSError:
            return f"{self.args.output_dir} is gone"

    def tell_where_to_go_on(self) -> None:
        name = f"checkpoint-{self.saved_step}" if self.saved_step else "the beginning"
        self.where = preemption.goes_on_from = f"the same command goes on from {name}"
