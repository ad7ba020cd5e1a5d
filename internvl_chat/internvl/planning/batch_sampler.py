"""Batches of one rank, in the order of the epoch plans."""

import math
from collections.abc import Iterator

import numpy as np

from internvl.planning.data_schedule import DataSchedule
from internvl.planning.epoch_plan import EpochPlan


def count_run_steps(
    schedule: DataSchedule, epoch: int, steps_before: int, num_train_epochs: float, max_steps: int = -1
) -> int:
    """Count the steps of a run; its epochs may differ in length.

    Args:
        epoch: the epoch that the run starts in.
        steps_before: steps of the epochs before it.
        num_train_epochs: may be fractional; ignored if `max_steps` is positive.
    """
    if max_steps > 0:
        return max_steps
    steps = steps_before
    while epoch < num_train_epochs:
        steps += math.ceil(schedule.count_epoch_steps(epoch) * min(1, num_train_epochs - epoch))
        epoch += 1
    return steps


BYTES_PER_TOKEN = 4 * 8  # input_ids, labels, position_ids, and one index of loss or image tokens, in int64


def compute_max_batch_bytes(plan: EpochPlan, lengths: np.ndarray, tile_size: int) -> int:
    """Compute the size of a plan's largest micro-batch: tiles in uint8, padded rows.

    Args:
        lengths: (N,) of SAMPLE_LENGTHS.
    """

    def sum_per_row(field: str) -> np.ndarray:  # (R + 1,); the last entry, which row -1 indexes, is 0
        return np.append(plan.sum_per_row(lengths[field].astype(np.int64)), 0)

    rows = plan.steps.reshape(-1, plan.steps.shape[-1])  # (micro-batches, rows)
    num_tiles = sum_per_row("tiles")[rows].sum(1)
    num_tokens = sum_per_row("tokens")[rows].max(1, initial=0) * rows.shape[1]
    return int((num_tiles * 3 * tile_size**2 + num_tokens * BYTES_PER_TOKEN).max(initial=0))


class PlanBatchSampler:
    """Batches of one rank, from a position to the run's end.

    A batch is a list of keys `(epoch, *sample ids)`, one for each packed sequence, as `PackedDataset` expects them. One
    iteration covers all epochs, so DataLoader workers prefetch across their boundaries. There is no `__len__` on
    purpose: transformers then takes the number of steps from `max_steps`.

    Args:
        rank: the column of the plan to read.
        epoch, step: the position to start from: `step` steps of `epoch` are done.
        num_steps: optimizer steps to yield batches for.
    """

    def __init__(self, schedule: DataSchedule, rank: int, epoch: int, step: int, num_steps: int):
        self.schedule, self.rank = schedule, rank
        self.epoch, self.step, self.num_steps = epoch, step, num_steps

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        epoch, step, num_left = self.epoch, self.step, self.num_steps
        while num_left > 0:
            plan = self.schedule.plan(epoch)
            steps = plan.steps[step : step + num_left, :, self.rank]  # (steps, accumulation, micro-batch)
            for rows in steps.reshape(-1, steps.shape[-1]).tolist():
                # A micro-batch without rows gets one empty row, because every rank must take part in every step.
                yield [(epoch, *plan.get_row_samples(row)) for row in rows if row >= 0] or [(epoch,)]
            epoch, step, num_left = epoch + 1, 0, num_left - len(steps)
