"""Laws of a plan, over many seeds and sizes."""

import itertools

import numpy as np
import pytest

from internvl.train.plan import plan_epoch

CASES = [
    (n, world, micro, accumulation, grouped)
    for n, world, micro, accumulation in itertools.product([1, 2, 7, 64, 253], [1, 2, 5], [1, 3], [1, 4])
    for grouped in (False, True)
]


def lengths(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(6, 0.8, n).astype(np.int32) + 1


def plan(n, world, micro, accumulation, grouped, seed=0, epoch=0, usable=None) -> np.ndarray:
    return plan_epoch(
        lengths(n),
        seed=seed,
        epoch=epoch,
        world_size=world,
        micro_batch=micro,
        accumulation=accumulation,
        group_by_length=grouped,
        usable=usable,
    )


@pytest.mark.parametrize("usable_share", [1.0, 0.7])
def test_every_usable_sample_once_in_as_few_steps_as_possible(usable_share):
    for case, seed in itertools.product(CASES, range(3)):
        n, world, micro, accumulation, _ = case
        usable = np.random.default_rng(seed).random(n) < usable_share
        usable[0] = True
        steps = plan(*case, seed=seed, usable=usable if usable_share < 1 else None)
        expected = np.flatnonzero(usable) if usable_share < 1 else np.arange(n)
        assert sorted(steps[steps >= 0]) == expected.tolist(), case
        assert steps.dtype == np.int64
        assert steps.shape == (-(-len(expected) // (world * micro * accumulation)), accumulation, world, micro), case


def test_only_the_last_step_has_empty_slots_and_they_are_everyones():
    for case in CASES:
        steps = plan(*case)
        empty = steps < 0
        assert not empty[:-1].any(), case
        per_rank = empty[-1].sum(axis=(0, 2))
        assert per_rank.max() - per_rank.min() <= 1, case
        filled = (~empty[-1]).sum(axis=2)  # (accumulation, world)
        assert filled.max() - filled.min() <= 1, case


def test_same_inputs_same_plan_and_everything_else_another():
    for grouped in (False, True):
        base = plan(253, 2, 3, 4, grouped, seed=3, epoch=1)
        assert np.array_equal(base, plan(253, 2, 3, 4, grouped, seed=3, epoch=1))
        assert not np.array_equal(base, plan(253, 2, 3, 4, grouped, seed=3, epoch=2))
        assert not np.array_equal(base, plan(253, 2, 3, 4, grouped, seed=4, epoch=1))


def test_order_without_grouping_is_a_fair_shuffle():
    positions = np.array([np.argsort(plan(60, 2, 3, 1, False, seed=seed).ravel()) for seed in range(400)])
    # The mean position of each sample over 400 epochs: 29.5 with a standard error of 0.87.
    assert np.abs(positions.mean(axis=0) - 29.5).max() < 4.5


def padding(steps: np.ndarray, tokens: np.ndarray) -> float:
    """Share of padded positions when each micro-batch is padded to its longest sample."""
    table = np.where(steps >= 0, tokens[steps], 0)
    return 1 - table.sum() / (table.max(axis=-1) * table.shape[-1]).sum()


def idle(steps: np.ndarray, tokens: np.ndarray) -> float:
    """Mean share of a whole step that ranks wait for the one with most tokens."""
    load = np.where(steps >= 0, tokens[steps], 0).sum(axis=(1, 3))[:-1]
    return 1 - (load.mean(axis=1) / load.max(axis=1)).mean()


@pytest.mark.parametrize("world, micro, accumulation", [(8, 4, 2), (2, 8, 1), (4, 2, 8)])
def test_grouping_saves_padding_and_waiting(world, micro, accumulation):
    tokens = lengths(5000)
    kwargs = {"seed": 0, "epoch": 0, "world_size": world, "micro_batch": micro, "accumulation": accumulation}
    random, grouped = (plan_epoch(tokens, group_by_length=flag, **kwargs) for flag in (False, True))
    assert padding(grouped, tokens) < padding(random, tokens) / 5
    assert idle(grouped, tokens) < 0.0025 < idle(random, tokens) / 20


def test_grouped_steps_come_in_random_order_with_changing_members():
    tokens = lengths(5000)
    means = {}
    members = {}
    for epoch in range(2):
        steps = plan_epoch(
            tokens, seed=0, epoch=epoch, world_size=2, micro_batch=4, accumulation=2, group_by_length=True
        )[:-1]
        means[epoch] = tokens[steps].mean(axis=(1, 2, 3))
        members[epoch] = {frozenset(step.ravel().tolist()) for step in steps}
    ranks = means[0].argsort().argsort()
    assert abs(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]) < 0.2, "steps must not run from long to short"
    assert len(members[0] & members[1]) < 0.05 * len(members[0]), "samples must not meet the same others every epoch"


def test_the_incomplete_step_is_not_always_the_longest_or_shortest():
    tokens = lengths(1001)
    last = [
        tokens[step[step >= 0]].mean()
        for epoch in range(40)
        for step in plan_epoch(
            tokens, seed=0, epoch=epoch, world_size=2, micro_batch=2, accumulation=2, group_by_length=True
        )[-1:]
    ]
    assert np.quantile(tokens, 0.2) < np.median(last) < np.quantile(tokens, 0.8) and np.std(last) > 50


def test_a_million_samples_take_seconds():
    tokens = lengths(1_000_000)
    steps = plan_epoch(tokens, seed=0, epoch=0, world_size=64, micro_batch=2, accumulation=2, group_by_length=True)
    assert steps.shape == (3907, 2, 64, 2)


# -- weights -----------------------------------------------------------------------------------------------------------


def resampled(sizes: list[int], shares: list[float], epoch: int = 0, usable=None, grouped: bool = False) -> np.ndarray:
    """How often each sample is drawn, data sets of these sizes having these shares."""
    weights = np.repeat(np.array(shares) / sizes, sizes)
    steps = plan_epoch(
        lengths(len(weights)),
        seed=0,
        epoch=epoch,
        world_size=2,
        micro_batch=3,
        accumulation=2,
        group_by_length=grouped,
        usable=usable,
        weights=weights,
    )
    return np.bincount(steps[steps >= 0], minlength=len(weights))


def per_dataset(draws: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.add.reduceat(draws, np.cumsum([0, *sizes[:-1]]))


@pytest.mark.parametrize("grouped", [False, True])
def test_draws_follow_the_weights_exactly(grouped):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sizes = rng.permutation(np.arange(1, 90))[: rng.integers(1, 7)].tolist()
        shares = np.sqrt(sizes) if seed % 2 else rng.lognormal(0, 2, len(sizes))
        draws = resampled(sizes, shares, grouped=grouped)
        total = per_dataset(draws, sizes)
        exact = shares / shares.sum() * sum(sizes)
        assert total.sum() == sum(sizes), "as many as there are samples"
        assert (np.floor(exact) <= total + 1e-6).all() and (total <= np.ceil(exact)).all()
        rounded_up = total > np.floor(exact + 1e-9)
        remainders = exact - np.floor(exact + 1e-9)
        assert remainders[rounded_up].min(initial=1) >= remainders[~rounded_up].max(initial=0) - 1e-9
        for part in np.split(draws, np.cumsum(sizes)[:-1]):
            assert part.max() - part.min() <= 1, "no sample comes again before every other has come"


def test_equal_weights_are_every_sample_once():
    assert (resampled([7, 20, 5], [7, 20, 5]) == 1).all()
    assert (resampled([50], [1]) == 1).all()


def test_weights_leave_unusable_samples_out():
    sizes = [30, 40, 10]
    usable = np.random.default_rng(0).random(80) < 0.6
    draws = resampled(sizes, np.sqrt(sizes), usable=usable)
    assert not draws[~usable].any() and draws.sum() == usable.sum()
    usable[:30] = False
    draws = resampled(sizes, np.sqrt(sizes), usable=usable)
    assert not draws[:30].any() and draws.sum() == usable.sum(), "a data set may fall away whole"
    assert not resampled(sizes, [0, 1, 1])[:30].any()


def test_draws_change_with_the_epoch_and_are_fair():
    sizes = [40, 10]
    epochs = np.array([resampled(sizes, np.sqrt(sizes), epoch) for epoch in range(400)])
    assert np.array_equal(epochs[3], resampled(sizes, np.sqrt(sizes), 3)) and not np.array_equal(epochs[3], epochs[4])
    total = per_dataset(epochs[0], sizes)
    for part, expected in zip(np.split(epochs, [40], axis=1), total / sizes, strict=True):
        assert np.abs(part.mean(axis=0) - expected).max() < 4 * 0.5 / np.sqrt(400), "each sample as often as another"
