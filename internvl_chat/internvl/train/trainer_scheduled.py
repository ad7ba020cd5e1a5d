"""HF Trainer whose steps are those of a schedule: its dataloader, its epochs, its place in a checkpoint.

Between `skipping.py` and `trainer.py`. Resuming is a place in a plan; no sample is read to get there.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME

from internvl.dist_utils import num_cores
from internvl.planning.data_schedule import DataSchedule
from internvl.planning.epoch_plan import SampleLengths
from internvl.runtime.signals import ignore_first_sigterm
from internvl.train.trainer_skipping import SkippingTrainer

logger = logging.getLogger(__name__)
DATA_STATE_FILE = "data_state.json"  # in a checkpoint: what `Schedule.state` says


class PlanBatchSampler:
    """Batch sampler of one rank: the rows of a plan in order, each as a key `(epoch, *sample ids)` of `PackedDataset`.

    Args:
        schedule: knows the plan of every epoch.
        rank: which column of a plan to read.
        epoch: tells the current epoch; asked when an epoch's iteration begins.
    """

    def __init__(self, schedule: DataSchedule, rank: int, epoch: Callable[[], int]):
        self.schedule, self.rank, self.epoch = schedule, rank, epoch

    def __len__(self) -> int:
        return self.schedule.steps(self.epoch()) * self.schedule.layout.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        epoch = self.epoch()
        plan = self.schedule.plan(epoch)
        mine = plan.steps[:, :, self.rank]
        for rows in mine.reshape(-1, mine.shape[-1]).tolist():
            yield [(epoch, *plan.row(row)) for row in rows if row >= 0] or [(epoch,)]


class ScheduledTrainer(SkippingTrainer):
    """Trains on the rows of a schedule.

    Args (beyond SkippingTrainer's):
        schedule: plans by epoch.
        accept_changed_data: go on from a checkpoint although the data is not what it was.
    """

    def __init__(self, *args, schedule: DataSchedule, accept_changed_data: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.schedule, self.accept_changed_data = schedule, accept_changed_data
        self.epoch, self.first_step = 0, 0  # the current epoch, and the number of steps before it
        self.loader: DataLoader | None = None
        self.went_on_at: tuple[int, int] | None = None  # epoch and step in it that a checkpoint was made at

    def get_train_dataloader(self) -> DataLoader:
        """Each rank reads its own column of the plan, so accelerate must not split the batches once more."""
        workers = min(self.args.dataloader_num_workers, num_cores())  # the order is the same with any number
        batches = PlanBatchSampler(self.schedule, self.args.process_index, epoch=lambda: self.epoch)
        self.loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            worker_init_fn=ignore_first_sigterm,
            prefetch_factor=self.args.dataloader_prefetch_factor or 2 if workers else None,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # for its workers: a run that goes on makes them once more
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        return self.loader

    # -- epochs --------------------------------------------------------------------------------------------------------

    def set_initial_training_values(self, args, dataloader):
        """As transformers', for epochs that need not be equally long."""
        values = super().set_initial_training_values(args, dataloader)
        _, per_epoch, examples, samples, batch, in_epoch, max_steps = values
        epoch, steps = self.epoch, self.first_step
        if args.max_steps > 0:
            while steps < args.max_steps:
                steps, epoch = steps + self.schedule.steps(epoch), epoch + 1
            return epoch, per_epoch, examples, samples, batch, in_epoch, max_steps
        while epoch < args.num_train_epochs:
            steps += math.ceil(self.schedule.steps(epoch) * min(1, args.num_train_epochs - epoch))
            epoch += 1
        return max(epoch, 1), per_epoch, examples, samples, batch, in_epoch, steps

    # -- resuming ------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint:
            self.go_on_from(Path(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            if self.loader:
                # Workers end now: left to the garbage collector, which may take their queues first, each is waited for
                # in vain for 5 s, killed, and leaves a folder in the temporary folder.
                self.loader._iterator = None

    def go_on_from(self, checkpoint: Path) -> None:
        """Let the schedule begin where the checkpoint was made.

        Raises:
            ValueError: its data was other data, or it does not say.
        """
        file = checkpoint / DATA_STATE_FILE
        if not file.is_file():
            raise ValueError(f"{checkpoint} does not tell which samples have been seen: it has no {DATA_STATE_FILE}.")
        state = json.loads(file.read_text())
        if state["data"] != self.schedule.fingerprint:
            self.admit_changes(self.data_of(checkpoint, state["data"]))
        steps = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"]
        self.went_on_at = self.schedule.go_on(state, lambda name: self.data_of(checkpoint, name))
        self.epoch, self.first_step = self.went_on_at[0], steps - self.went_on_at[1]
        logger.info("going on at step %d of epoch %d", self.went_on_at[1], self.epoch)

    def admit_changes(self, before: DataSchedule) -> None:
        changes = self.schedule.differences(before)
        if not self.accept_changed_data:
            raise ValueError(
                f"the data is not what the checkpoint was trained on: {changes}. --accept_changed_data True goes on "
                "with what has not been seen of it; --overwrite_output_dir True starts afresh."
            )
        logger.warning("the data has changed since the checkpoint: %s", changes)

    def data_of(self, checkpoint: Path, fingerprint: str) -> DataSchedule:
        """The data that a run was on, as it is noted beside its checkpoints."""
        file = checkpoint.parent / f"data-{fingerprint}.npz"
        if not file.is_file():
            raise ValueError(f"the data is not what {checkpoint} was trained on; {file}, which tells that, is absent.")
        kept = np.load(file)
        lengths = SampleLengths(*(kept[name] for name in SampleLengths._fields))
        return DataSchedule(lengths, kept["digests"], self.schedule.layout, kept.get("weights"))

    def note_data(self) -> None:
        file = Path(self.args.output_dir, f"data-{self.schedule.fingerprint}.npz")
        if not file.exists():
            arrays = {**self.schedule.lengths._asdict(), "digests": self.schedule.digests}
            arrays |= {} if self.schedule.weights is None else {"weights": self.schedule.weights}
            unfinished = file.with_name(f"unfinished-{file.name}")
            np.savez_compressed(unfinished, **arrays)
            os.replace(unfinished, file)

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        start = super()._init_training_state(*args, **kwargs)
        if self.went_on_at:
            start = self.went_on_at[0], self.went_on_at[1] * self.args.gradient_accumulation_steps
        return start

    def _run_epoch(self, *, epoch: int, **kwargs):
        if epoch != self.epoch:
            self.epoch, self.first_step = epoch, self.state.global_step
        steps = self.schedule.steps(epoch)
        lengths = {"num_update_steps_per_epoch": steps, "steps_in_epoch": steps * self.args.gradient_accumulation_steps}
        return super()._run_epoch(epoch=epoch, **kwargs | lengths)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = self.schedule.state(self.epoch, self.state.global_step - self.first_step)
            Path(output_dir, DATA_STATE_FILE).write_text(json.dumps(state, indent=2))
            self.note_data()
