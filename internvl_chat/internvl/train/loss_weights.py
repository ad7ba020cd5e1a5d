"""Weights of micro-batches in the loss of a step."""

from collections.abc import Callable
from typing import Any

import torch

from internvl.model.internvl_chat.documents import compute_label_weights
from internvl.planning.data_schedule import DataSchedule


class MicroBatchWeights:
    """Weights of micro-batches: the mean of weight * loss is a step's loss.

    Args:
        schedule: the epoch plans.
        loss_reduction: `--loss_reduction`.
        all_gather: average the loss of a step over its loss tokens, across ranks and micro-batches; otherwise average
            the means of its micro-batches.
    """

    def __init__(self, schedule: DataSchedule, loss_reduction: str, all_gather: bool):
        self.schedule, self.loss_reduction, self.all_gather = schedule, loss_reduction, all_gather
        self.mean_label_weight = torch.tensor(0.0)  # of the micro-batches of a step

    def begin_step(
        self, batches: list[dict], device: torch.device, mean_over_ranks_fn: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Measure the micro-batches of a step. A collective on `device`.

        They are still on the CPU.
        """
        if self.all_gather and batches:
            weight: Any = sum(map(self.sum_label_weights, batches))
            self.mean_label_weight = mean_over_ranks_fn(weight.to(device, non_blocking=True)) / len(batches)

    def compute(self, batch: dict, epoch: int, step: int) -> torch.Tensor | float:
        """Compute the weight of a micro-batch in a step of an epoch."""
        if self.all_gather:
            mean = self.mean_label_weight
            return self.sum_label_weights(batch) / torch.where(mean == 0, 1.0, mean)
        # Micro-batches have equal weights. Empty ones in an epoch's last step do not count, as they would lower its
        # loss and gradient.
        rows = self.schedule.plan(epoch).steps[step]  # (accumulation, ranks, micro-batch)
        return rows[..., 0].size / (rows >= 0).any(-1).sum()

    def sum_label_weights(self, batch: dict) -> torch.Tensor:
        """Add up the weights of a batch's loss tokens, to a scalar."""
        weights = compute_label_weights(batch["labels"], batch["position_ids"], self.loss_reduction)
        return weights.flatten()[batch["loss_indices"] + 1].sum()
