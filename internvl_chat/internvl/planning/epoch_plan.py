"""Which samples form each row and which rows form each step of an epoch: a pure function of sizes and a seed.

Stands between `lengths.py` and the dataloader. No torch, no clock, no ranks that talk to each other: every rank
computes the whole plan and reads its own column, so the number of steps is exact before the first one and resuming is
"epoch e, step s". A padded batch, batches of similar length and packed rows are three settings of it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from internvl.planning.bin_packing import pack_samples


class SampleLengths(NamedTuple):
    """Sizes of samples, (N,) integers each: tokens, trained tokens, tiles. A sample of 0 tokens cannot be used."""

    tokens: np.ndarray
    trained: np.ndarray
    tiles: np.ndarray


class SampleCost(NamedTuple):
    """FLOPs of a sample: those of a token, of a trained token, of a tile, and of a pair of tokens (attention)."""

    token: float = 1.0
    trained: float = 0.0
    tile: float = 0.0
    pair: float = 0.0

    def of(self, lengths: SampleLengths) -> np.ndarray:
        """(N,) float32."""
        tokens = lengths.tokens.astype(np.float32)
        linear = tokens * (self.token + self.pair * tokens)
        return linear + np.float32(self.trained) * lengths.trained + np.float32(self.tile) * lengths.tiles


@dataclass(frozen=True)
class PlanLayout:
    """What a plan is made for.

    Attributes:
        micro_batch: rows of one forward pass. accumulation: forward passes of a step.
        group_by_length: ranks get rows of similar length at the same time, in nearly equal numbers of tokens.
        packed: rows hold as many samples as fit into `max_tokens` and `max_tiles`, and ranks get rows of nearly equal
            `cost` at the same time; otherwise a row holds one sample.
    """

    seed: int
    world_size: int
    micro_batch: int
    accumulation: int
    group_by_length: bool = False
    packed: bool = False
    max_tokens: int = 0
    max_tiles: int = 0
    cost: SampleCost = SampleCost()


@dataclass(frozen=True)
class EpochPlan:
    """An epoch. Row r holds the samples `samples[starts[r]:starts[r + 1]]`.

    Attributes:
        steps: (steps, accumulation, world_size, micro_batch) numbers of rows; -1 marks an empty slot.
    """

    samples: np.ndarray
    starts: np.ndarray
    steps: np.ndarray

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps)

    def row(self, number: int) -> list[int]:
        """The samples of a row; none of row -1."""
        return self.samples[self.starts[number] : self.starts[number + 1]].tolist() if number >= 0 else []

    def seen(self, steps: int, samples: int) -> np.ndarray:
        """(samples,) how often each sample is in the first so many steps."""
        rows = self.steps[:steps].ravel()
        lengths = np.zeros(len(self.starts), np.int64)  # row -1 has none
        lengths[:-1] = np.diff(self.starts)
        first = np.repeat(self.starts[rows] - np.cumsum(lengths[rows]) + lengths[rows], lengths[rows])
        return np.bincount(self.samples[first + np.arange(len(first))], minlength=samples)

    def totals(self, values: np.ndarray) -> np.ndarray:
        """Sums over the samples of each row: (N,) values -> (R,)."""
        return np.add.reduceat(values[self.samples], self.starts[:-1]) if len(self.samples) else values[:0]


def plan_epoch(
    lengths: SampleLengths,
    layout: PlanLayout,
    epoch: int,
    *,
    weights: np.ndarray | None = None,
    seen: np.ndarray | None = None,
) -> EpochPlan:
    """Lay out one epoch.

    Args:
        lengths: of N samples; those of 0 tokens are left out.
        weights: (N,) float64 >= 0; how often a sample is to be drawn, relative to the others. Neighbours of equal
            weight count as one data set. It gets its share of the draws, rounded by largest remainder, and deals them
            out without replacement: no two of its samples differ by more than one draw.
        seen: (N,) how often a sample has been seen in this epoch already: what is left is planned.

    Returns:
        The plan; every usable sample is in it once, with `weights` as many draws as there are usable samples; steps are
        as few as the rows allow. Only the last step has empty slots, spread evenly over ranks and micro-batches.
    """
    ids = np.flatnonzero(lengths.tokens).astype(np.int32)
    if weights is not None:
        # Whatever the number of ranks: the rest of an epoch is the rest of the same draws.
        ids = _draw(ids, np.asarray(weights, np.float64)[ids], np.random.default_rng((layout.seed, epoch)))
    if seen is not None:
        left = np.maximum(np.bincount(ids, minlength=len(lengths.tokens)) - seen, 0)
        ids = np.repeat(np.arange(len(left), dtype=np.int32), left)
    rng = np.random.default_rng((layout.seed, epoch, 1))
    if layout.packed:
        order, starts = pack_samples(lengths.tokens[ids], lengths.tiles[ids], layout.max_tokens, layout.max_tiles, rng)
        ids, size = ids[order], layout.cost.of(lengths)
    else:
        ids, starts = rng.permutation(ids), np.arange(len(ids) + 1)
        size = lengths.tokens if layout.group_by_length else None
    plan = EpochPlan(ids, starts, np.empty((0, 1, 1, 1), np.int64))
    return EpochPlan(ids, starts, _steps(len(starts) - 1, None if size is None else plan.totals(size), layout, rng))


def _draw(ids: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many ids as given, each run of equal weights by its share of the whole, in no particular order."""
    assert (weights >= 0).all() and weights.any(), "weights must be at least 0, and not all 0"
    starts = np.flatnonzero(np.diff(weights, prepend=np.nan))  # nan differs from everything
    exact = np.add.reduceat(weights, starts) * (len(ids) / weights.sum())
    draws = np.floor(exact).astype(np.int64)
    draws[np.argsort(draws - exact, kind="stable")[: len(ids) - draws.sum()]] += 1
    runs = np.split(ids, starts[1:])
    return np.concatenate([np.resize(rng.permutation(run), n) for run, n in zip(runs, draws, strict=True)])


def _steps(rows: int, size: np.ndarray | None, layout: PlanLayout, rng: np.random.Generator) -> np.ndarray:
    """Rows in random order; with a `size` of each, those that ranks get at the same time are of nearly equal size."""
    together = layout.micro_batch * layout.world_size
    step = layout.accumulation * together
    left_over = rows % step
    order = rng.permutation(rows)
    start = rows - left_over
    if size is not None:
        # Lengths within 5 %, costs within 0.2 %, are the same: neighbours change from epoch to epoch.
        spread = 0.002 if layout.packed else 0.05
        order = order[np.argsort(-size[order] * rng.uniform(1 - spread, 1 + spread, rows), kind="stable")]
        # The incomplete step at the end takes its rows from a random place, not always the longest or the shortest.
        start = together * int(rng.integers((rows - left_over) // together + 1))
    rest = order[start : start + left_over]
    deals = np.delete(order, np.s_[start : start + left_over]).reshape(-1, together)
    if size is not None:
        deals = rng.permutation(deals)
        deals = np.take_along_axis(deals, np.argsort(-size[deals], axis=1, kind="stable"), axis=1)
        # Rows descend: deal them to the ranks there and back, as cards.
        deals = deals.reshape(-1, layout.micro_batch, layout.world_size)
        deals[:, 1::2] = deals[:, 1::2, ::-1].copy()
    steps = deals.reshape(-1, layout.accumulation, layout.micro_batch, layout.world_size)
    if left_over:
        last = np.full(step, -1)
        last[:left_over] = rest
        # Filled rank by rank, then micro-batch by micro-batch, so that the empty slots are everyone's.
        last = last.reshape(layout.micro_batch, layout.accumulation, layout.world_size).swapaxes(0, 1)
        steps = np.concatenate([steps, last[None]])
    return np.ascontiguousarray(steps.swapaxes(2, 3).astype(np.int64, copy=False))
