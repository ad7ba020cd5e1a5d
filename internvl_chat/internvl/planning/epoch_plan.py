"""Epoch plans: the samples of each row, the rows of each step.

A plan is a pure function of sample lengths, layout, seed and epoch: no torch, no clock, no communication. Every rank
computes the complete plan and reads its own column of it. The number of steps is therefore known before the first one,
and a position in the data is just "epoch e, step s". Padded batches, batches of similar length and packed sequences
are three layouts of the same plan.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from internvl.planning.bin_packing import pack_samples

# Lengths of samples are an (N,) structured array of this type. A sample of 0 tokens is unusable.
SAMPLE_LENGTHS = np.dtype([("tokens", np.int32), ("loss_tokens", np.int32), ("tiles", np.int32)])


def make_sample_lengths(tokens: np.ndarray, loss_tokens: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Combine three (N,) columns into an (N,) array of SAMPLE_LENGTHS."""
    lengths = np.empty(len(tokens), SAMPLE_LENGTHS)
    lengths["tokens"], lengths["loss_tokens"], lengths["tiles"] = tokens, loss_tokens, tiles
    return lengths


class SampleCost(NamedTuple):
    """FLOPs of a sample in a training step, by what causes them."""

    per_token: float = 1.0
    per_loss_token: float = 0.0
    per_tile: float = 0.0
    per_token_pair: float = 0.0  # attention: n tokens have n^2 pairs

    def compute(self, lengths: np.ndarray) -> np.ndarray:
        """Return the (N,) costs of samples."""
        tokens = lengths["tokens"].astype(np.float32)
        linear = tokens * (self.per_token + self.per_token_pair * tokens)
        # Sums over loss tokens and tiles are in float64: a float32 scalar times an int32 array.
        return (
            linear
            + np.float32(self.per_loss_token) * lengths["loss_tokens"]
            + np.float32(self.per_tile) * lengths["tiles"]
        )


@dataclass(frozen=True)
class PlanLayout:
    """Sizes of steps and rows that a plan is made for.

    Attributes:
        micro_batch_size: rows of one forward pass on one rank.
        gradient_accumulation: forward passes of a rank in one step.
        group_by_length: in each forward pass, ranks process rows of similar length and nearly equal numbers of tokens.
        packed: a row holds as many samples as fit into `max_tokens` and `max_tiles`, and in each forward pass ranks
            process rows of nearly equal `sample_cost`. Otherwise a row holds one sample.
    """

    seed: int
    world_size: int
    micro_batch_size: int
    gradient_accumulation: int
    group_by_length: bool = False
    packed: bool = False
    max_tokens: int = 0
    max_tiles: int = 0
    sample_cost: SampleCost = SampleCost()

    @property
    def global_batch_size(self) -> int:
        """Rows of one step on all ranks."""
        return self.world_size * self.micro_batch_size * self.gradient_accumulation


@dataclass(frozen=True)
class EpochPlan:
    """The rows and steps of an epoch.

    Attributes:
        samples: (S,) sample ids, row after row. Row r holds `samples[row_starts[r] : row_starts[r + 1]]`.
        row_starts: (R + 1,)
        steps: (num_steps, gradient_accumulation, world_size, micro_batch_size) row ids; -1 marks an empty slot.
    """

    samples: np.ndarray
    row_starts: np.ndarray
    steps: np.ndarray

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.steps)

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    def get_row_samples(self, row: int) -> list[int]:
        """List the samples of a row; none for the empty row -1."""
        return self.samples[self.row_starts[row] : self.row_starts[row + 1]].tolist() if row >= 0 else []

    def count_seen(self, num_steps: int, num_samples: int) -> np.ndarray:
        """Count how often each sample is in the first `num_steps` steps: (num_samples,)."""
        rows = self.steps[:num_steps].ravel()
        row_sizes = np.zeros(len(self.row_starts), np.int64)
        row_sizes[:-1] = np.diff(self.row_starts)  # the last entry, which row -1 indexes, stays 0
        sizes = row_sizes[rows]
        # Positions in `samples`, row after row, without a loop over rows.
        offsets = np.repeat(self.row_starts[rows] - np.cumsum(sizes) + sizes, sizes)
        return np.bincount(self.samples[offsets + np.arange(len(offsets))], minlength=num_samples)

    def sum_per_row(self, values: np.ndarray) -> np.ndarray:
        """Add up (N,) values of samples over each row, to (R,)."""
        return np.add.reduceat(values[self.samples], self.row_starts[:-1]) if len(self.samples) else values[:0]


def plan_epoch(
    lengths: np.ndarray,
    layout: PlanLayout,
    epoch: int,
    *,
    weights: np.ndarray | None = None,
    seen: np.ndarray | None = None,
) -> EpochPlan:
    """Plan the rows and steps of one epoch.

    Args:
        lengths: (N,) of SAMPLE_LENGTHS. Samples of 0 tokens are skipped.
        weights: (N,) float64 >= 0, how often a sample is drawn relative to the others. Neighbors of equal weight form
            one dataset. A dataset gets its share of the draws, rounded by largest remainder, and draws its samples
            without replacement: the counts of two of its samples differ by at most 1.
        seen: (N,) how often each sample has been seen in this epoch already. Only the rest is planned.

    Returns:
        The plan. Without `weights` every usable sample is in it once; with `weights` there are as many draws as usable
        samples. All steps are full except the last one, whose empty slots are spread evenly over ranks and
        micro-batches.
    """
    # A column of a structured array is a strided view, on which repeated gathers are slow.
    tokens = np.ascontiguousarray(lengths["tokens"])
    ids = np.flatnonzero(tokens).astype(np.int32)
    if weights is not None:
        # The draws do not depend on the layout, so a run that resumes in another layout continues the same draws.
        ids = _draw_samples(ids, np.asarray(weights, np.float64)[ids], np.random.default_rng((layout.seed, epoch)))
    if seen is not None:
        num_left = np.maximum(np.bincount(ids, minlength=len(tokens)) - seen, 0)
        ids = np.repeat(np.arange(len(num_left), dtype=np.int32), num_left)
    rng = np.random.default_rng((layout.seed, epoch, 1))
    if layout.packed:
        order, row_starts = pack_samples(tokens[ids], lengths["tiles"][ids], layout.max_tokens, layout.max_tiles, rng)
        ids, sample_sizes = ids[order], layout.sample_cost.compute(lengths)
    else:
        ids, row_starts = rng.permutation(ids), np.arange(len(ids) + 1)
        sample_sizes = tokens if layout.group_by_length else None
    rows = EpochPlan(ids, row_starts, np.empty((0, 1, 1, 1), np.int64))
    row_sizes = None if sample_sizes is None else rows.sum_per_row(sample_sizes)
    return EpochPlan(ids, row_starts, _arrange_steps(rows.num_rows, row_sizes, layout, rng))


def _draw_samples(ids: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw len(ids) ids; each run of equal weights gets its share."""
    assert (weights >= 0).all() and weights.any(), "weights must be at least 0, and not all 0"
    run_starts = np.flatnonzero(np.diff(weights, prepend=np.nan))  # nan differs from everything
    exact = np.add.reduceat(weights, run_starts) * (len(ids) / weights.sum())
    draws = np.floor(exact).astype(np.int64)
    draws[np.argsort(draws - exact, kind="stable")[: len(ids) - draws.sum()]] += 1  # largest remainders
    runs = np.split(ids, run_starts[1:])
    return np.concatenate([np.resize(rng.permutation(run), n) for run, n in zip(runs, draws, strict=True)])


def _arrange_steps(
    num_rows: int, row_sizes: np.ndarray | None, layout: PlanLayout, rng: np.random.Generator
) -> np.ndarray:
    """Arrange rows into steps, in random order.

    Args:
        row_sizes: (R,) tokens or cost. If given, all ranks process rows of nearly equal size in each forward pass.
    """
    concurrent = layout.micro_batch_size * layout.world_size  # rows of one forward pass on all ranks
    num_last = num_rows % layout.global_batch_size  # rows of the incomplete last step
    order = rng.permutation(num_rows)
    last_start = num_rows - num_last
    if row_sizes is not None:
        # Noise on the sort key changes neighbors from epoch to epoch. Lengths within 5 % and costs within 0.2 % count
        # as equal.
        noise = 0.002 if layout.packed else 0.05
        order = order[np.argsort(-row_sizes[order] * rng.uniform(1 - noise, 1 + noise, num_rows), kind="stable")]
        # The incomplete step takes its rows from a random place, not always the longest or the shortest ones.
        last_start = concurrent * int(rng.integers((num_rows - num_last) // concurrent + 1))
    last_rows = order[last_start : last_start + num_last]
    groups = np.delete(order, np.s_[last_start : last_start + num_last]).reshape(-1, concurrent)
    if row_sizes is not None:
        groups = rng.permutation(groups)
        groups = np.take_along_axis(groups, np.argsort(-row_sizes[groups], axis=1, kind="stable"), axis=1)
        # Rows descend in size. Ranks get them in the order 0..n-1, n-1..0, 0..n-1, ..., which balances their sums.
        groups = groups.reshape(-1, layout.micro_batch_size, layout.world_size)
        groups[:, 1::2] = groups[:, 1::2, ::-1].copy()
    shape = layout.gradient_accumulation, layout.micro_batch_size, layout.world_size
    steps = groups.reshape(-1, *shape)
    if num_last:
        last = np.full(layout.global_batch_size, -1)
        last[:num_last] = last_rows
        # Filled rank by rank, then forward pass by forward pass, which spreads empty slots over all of them.
        last = last.reshape(layout.micro_batch_size, layout.gradient_accumulation, layout.world_size).swapaxes(0, 1)
        steps = np.concatenate([steps, last[None]])
    return np.ascontiguousarray(steps.swapaxes(2, 3).astype(np.int64, copy=False))
