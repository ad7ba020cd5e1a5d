"""HF Trainer with a dataloader that reads a plan, one optimizer group a part, and reports of speed and bad samples.

Made by `build.py`; checkpoints are `checkpointing.py`'s, everything else of a run (loop, DeepSpeed, schedule,
TensorBoard) is transformers' own.
"""

import logging
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from internvl.dist_utils import gathered
from internvl.train.checkpointing import CheckpointingTrainer
from internvl.train.constants import BadSample
from internvl.train.metrics import Throughput, rates
from internvl.train.trainable import parameter_groups, watch_gradients

logger = logging.getLogger(__name__)


class PlannedBatches:
    """Batch sampler of one rank: the rows of a plan in order, each as the key `(epoch, *sample ids)` of `RowDataset`.

    Args:
        plan: epoch -> array (steps, accumulation, world_size, micro_batch) of sample ids, -1 where a slot is empty.
        rank: which column of the plan to read.
        epoch: tells the current epoch; asked when an epoch's iteration begins.
    """

    def __init__(self, plan: Callable[[int], np.ndarray], rank: int, epoch: Callable[[], int]):
        self.plan, self.rank, self.epoch = plan, rank, epoch
        steps, accumulation = plan(0).shape[:2]
        self.length = steps * accumulation

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        epoch = self.epoch()
        mine = self.plan(epoch)[:, :, self.rank]
        for rows in mine.reshape(-1, mine.shape[-1]).tolist():
            yield [(epoch, row) for row in rows if row >= 0] or [(epoch, -1)]


class InternVLTrainer(CheckpointingTrainer):
    """Trains on the rows of a plan.

    Args (beyond CheckpointingTrainer's):
        plan: epoch -> array of sample ids, as `plan_epoch` returns it.
        bad_samples: sentences on the samples that measuring already found unusable.
        max_bad_samples: how many unusable samples may be left out before the run stops.
    """

    def __init__(
        self, *args, plan: Callable[[int], np.ndarray], bad_samples: list[str], max_bad_samples: int, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.plan = plan
        self.bad_samples = list(bad_samples)
        self.max_bad_samples = max_bad_samples
        self.found_bad: list[str] = []  # by this rank, since the last report
        self.throughput = Throughput()
        self.check_gradients: Callable[[], None] | None = None

    # -- data --------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Each rank reads its own column of the plan, so accelerate must not split the batches once more."""
        cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        workers = min(self.args.dataloader_num_workers, cores)  # the order is the same with any number
        batches = PlannedBatches(self.plan, self.args.process_index, epoch=lambda: int(self.state.epoch or 0))
        return DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor or 2 if workers else None,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
            persistent_workers=workers > 0,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def _prepare_inputs(self, inputs: dict) -> dict:
        self.found_bad += inputs.pop("bad_samples", [])
        tokens = (inputs["input_ids"] != self.processing_class.pad_token_id).sum().item()
        self.throughput.count(tokens, int(inputs["image_flags"].sum()))
        return super()._prepare_inputs(inputs)

    # -- step --------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.hf_ds_config.is_offload():
                from deepspeed.ops.adam import DeepSpeedCPUAdam

                optimizer_class = DeepSpeedCPUAdam  # the one that steps states which are not on the device
                kwargs = {key: kwargs[key] for key in ("lr", "betas", "eps")}
            groups = parameter_groups(self.model, self.args)
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss * self.micro_batch_weight()
        return (loss, outputs) if return_outputs else loss

    def micro_batch_weight(self) -> float:
        """The mean over ranks and accumulation counts every micro-batch alike; the empty ones of an epoch's last step
        must not make its loss and gradient smaller."""
        step = self.plan(int(self.state.epoch or 0))
        step = step[self.state.global_step % len(step)]
        return step[..., 0].size / (step >= 0).any(-1).sum()

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self.check_gradients is None:
            self.check_gradients = watch_gradients(self.model.named_parameters())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.check_gradients()
            self.check_gradients = lambda: None
        return loss

    # -- reports -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the speed of all ranks to a line of the log; report the bad samples that any of them met."""
        reports = gathered((self.throughput.take(), self.found_bad))
        self.found_bad = []
        if "loss" in logs:
            logs.update(rates([speed for speed, _ in reports]))
        self.report_bad_samples([sentence for _, found in reports for sentence in found])
        super().log(logs, start_time)

    def report_bad_samples(self, found: list[str]) -> None:
        new = [sentence for sentence in dict.fromkeys(found) if sentence not in self.bad_samples]
        self.bad_samples += new
        for sentence in new:
            logger.warning("left out: %s", sentence)
        if new and len(self.bad_samples) > self.max_bad_samples:
            raise too_many_bad_samples(self.bad_samples, self.max_bad_samples)


def too_many_bad_samples(sentences: list[str], allowed: int) -> BadSample:
    """The error that ends a run: how many samples are unusable, and the list of them."""
    shown = "\n".join(f"  {sentence}" for sentence in sentences[:20])
    more = f"\n  ... and {len(sentences) - 20} more" if len(sentences) > 20 else ""
    return BadSample(
        f"{len(sentences)} samples cannot be used, --max_bad_samples allows {allowed}; mend or remove them:\n"
        f"{shown}{more}"
    )
