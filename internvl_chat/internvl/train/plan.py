"""Which samples form each step of an epoch: a pure function of lengths and a seed.

Stands between `lengths.py` and the dataloader. No torch, no clock, no ranks that talk to each other: every rank
computes the whole plan and reads its own column, so the number of steps is exact before the first one and resuming is
"epoch e, step s".
"""

import numpy as np


def plan_epoch(
    tokens: np.ndarray,
    *,
    seed: int,
    epoch: int,
    world_size: int,
    micro_batch: int,
    accumulation: int,
    group_by_length: bool = False,
    usable: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Lay out one epoch.

    Args:
        tokens: (N,) length of each sample; only looked at with `group_by_length`.
        group_by_length: steps of samples of similar length, dealt so that ranks get nearly equal numbers of tokens.
        usable: (N,) bool; samples that are False are left out.
        weights: (N,) float64 >= 0; how often a sample is to be drawn, relative to the others. Neighbours of equal
            weight count as one data set. It gets its share of the draws, rounded by largest remainder, and deals them
            out without replacement: no two of its samples differ by more than one draw.

    Returns:
        (steps, accumulation, world_size, micro_batch) int64 sample ids, every usable sample once, with `weights` as
        many draws as there are usable samples; steps as few as possible. -1 marks an empty slot; only the last step
        has any, spread evenly over ranks and micro-batches.
    """
    rng = np.random.default_rng((seed, epoch))
    ids = np.arange(len(tokens)) if usable is None else np.flatnonzero(usable)
    if weights is not None:
        ids = _draw(ids, np.asarray(weights, np.float64)[ids], rng)
    ids = rng.permutation(ids)
    size = accumulation * micro_batch * world_size
    if group_by_length:
        ids = _group(ids, np.asarray(tokens), size, rng)
    whole = len(ids) - len(ids) % size
    steps = ids[:whole].reshape(-1, accumulation, micro_batch, world_size)
    if whole < len(ids):
        last = np.full(size, -1)
        last[: len(ids) - whole] = ids[whole:]
        # Filled rank by rank, then micro-batch by micro-batch, so that the empty slots are everyone's.
        last = last.reshape(micro_batch, accumulation, world_size).swapaxes(0, 1)
        steps = np.concatenate([steps, last[None]])
    if group_by_length:
        # Samples of a step descend in length: deal them to the ranks there and back, as cards.
        deals = steps.reshape(len(steps), accumulation * micro_batch, world_size)
        deals[:, 1::2] = deals[:, 1::2, ::-1].copy()
    return np.ascontiguousarray(steps.swapaxes(2, 3).astype(np.int64, copy=False))


def _draw(ids: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many ids as given, each run of equal weights by its share of the whole, in no particular order."""
    assert (weights >= 0).all() and weights.any(), "weights must be at least 0, and not all 0"
    starts = np.flatnonzero(np.diff(weights, prepend=np.nan))  # nan differs from everything
    exact = np.add.reduceat(weights, starts) * (len(ids) / weights.sum())
    draws = np.floor(exact).astype(np.int64)
    draws[np.argsort(draws - exact, kind="stable")[: len(ids) - draws.sum()]] += 1
    runs = np.split(ids, starts[1:])
    return np.concatenate([np.resize(rng.permutation(run), n) for run, n in zip(runs, draws, strict=True)])


def _group(ids: np.ndarray, tokens: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Order ids so that each run of `size` is of similar length, descending; the runs are in random order."""
    # Lengths that differ by less than 5 % are the same: neighbours change from epoch to epoch.
    ids = ids[np.argsort(-tokens[ids] * rng.uniform(0.95, 1.05, len(ids)), kind="stable")]
    left_over = len(ids) % size
    # The incomplete step at the end takes its samples from a random place, not always the longest or the shortest.
    start = size * int(rng.integers(len(ids) // size + 1))
    rest = ids[start : start + left_over]
    groups = np.delete(ids, np.s_[start : start + left_over]).reshape(-1, size)
    groups = rng.permutation(groups)
    groups = np.take_along_axis(groups, np.argsort(-tokens[groups], axis=1, kind="stable"), axis=1)
    return np.concatenate([groups.ravel(), rest])
