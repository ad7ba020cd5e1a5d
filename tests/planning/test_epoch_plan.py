"""Laws of a plan, over many seeds and sizes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl.planning.epoch_plan import EpochPlan, PlanLayout, SampleCost, SampleLengths, plan_epoch
from internvl.planning.plan_report import load_imbalance, packing_efficiency

CASES = [
    (n, world, micro, accumulation, grouped)
    for n, world, micro, accumulation in itertools.product([1, 2, 7, 64, 253], [1, 2, 5], [1, 3], [1, 4])
    for grouped in (False, True)
]


def lengths(n: int, seed: int = 0, usable: np.ndarray | bool = True) -> SampleLengths:
    """Of image samples of 260 tokens a tile and text of any length, half and half; 0 where a sample is not usable."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(1, 6, n) * (rng.random(n) < 0.5)
    tokens = tiles * 260 + np.minimum(rng.lognormal(5, 0.8, n), 1500).astype(int) + 2
    return SampleLengths(*(np.where(usable, values, 0).astype(np.int32) for values in (tokens, tokens // 2, tiles)))


def ids(plan: EpochPlan) -> np.ndarray:
    """The samples of a plan whose rows hold one each, in the shape of its steps; -1 in empty slots."""
    return np.append(plan.samples, -1)[plan.steps]


def plan(n, world, micro, accumulation, grouped, seed=0, epoch=0, usable=True) -> np.ndarray:
    layout = PlanLayout(seed, world, micro, accumulation, group_by_length=grouped)
    return ids(plan_epoch(lengths(n, usable=usable), layout, epoch))


@pytest.mark.parametrize("usable_share", [1.0, 0.7])
def test_every_usable_sample_once_in_as_few_steps_as_possible(usable_share):
    for case, seed in itertools.product(CASES, range(3)):
        n, world, micro, accumulation, _ = case
        usable = np.random.default_rng(seed).random(n) < usable_share
        usable[0] = True
        steps = plan(*case, seed=seed, usable=usable if usable_share < 1 else True)
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


def waiting(steps: np.ndarray, tokens: np.ndarray) -> float:
    """Mean share of a whole step that ranks wait for the one with most tokens."""
    load = np.where(steps >= 0, tokens[steps], 0).sum(axis=(1, 3))[:-1]
    return 1 - (load.mean(axis=1) / load.max(axis=1)).mean()


@pytest.mark.parametrize("world, micro, accumulation", [(8, 4, 2), (2, 8, 1), (4, 2, 8)])
def test_grouping_saves_padding_and_waiting(world, micro, accumulation):
    tokens = lengths(5000).tokens
    random, grouped = (plan(5000, world, micro, accumulation, flag) for flag in (False, True))
    assert padding(grouped, tokens) < padding(random, tokens) / 5
    assert waiting(grouped, tokens) < 0.004 < waiting(random, tokens) / 10


def test_grouped_steps_come_in_random_order_with_changing_members():
    tokens = lengths(5000).tokens
    means = {}
    members = {}
    for epoch in range(2):
        steps = plan(5000, 2, 4, 2, True, epoch=epoch)[:-1]
        means[epoch] = tokens[steps].mean(axis=(1, 2, 3))
        members[epoch] = {frozenset(step.ravel().tolist()) for step in steps}
    ranks = means[0].argsort().argsort()
    assert abs(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]) < 0.2, "steps must not run from long to short"
    assert len(members[0] & members[1]) < 0.05 * len(members[0]), "samples must not meet the same others every epoch"


def test_the_incomplete_step_is_not_always_the_longest_or_shortest():
    tokens = lengths(1001).tokens
    last = [
        tokens[step[step >= 0]].mean() for epoch in range(40) for step in plan(1001, 2, 2, 2, True, epoch=epoch)[-1:]
    ]
    assert np.quantile(tokens, 0.2) < np.median(last) < np.quantile(tokens, 0.8) and np.std(last) > 50


# -- weights -----------------------------------------------------------------------------------------------------------


def resampled(sizes: list[int], shares: list[float], epoch: int = 0, usable=True, **layout) -> np.ndarray:
    """How often each sample is drawn, data sets of these sizes having these shares."""
    weights = np.repeat(np.array(shares) / sizes, sizes)
    plan = plan_epoch(lengths(len(weights), usable=usable), PlanLayout(0, 2, 3, 2, **layout), epoch, weights=weights)
    return plan.seen(len(plan), len(weights))


def per_dataset(draws: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.add.reduceat(draws, np.cumsum([0, *sizes[:-1]]))


@pytest.mark.parametrize(
    "layout", [{}, {"group_by_length": True}, {"packed": True, "max_tokens": 3000, "max_tiles": 9}]
)
def test_draws_follow_the_weights_exactly(layout):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sizes = rng.permutation(np.arange(1, 90))[: rng.integers(1, 7)].tolist()
        shares = np.sqrt(sizes) if seed % 2 else rng.lognormal(0, 2, len(sizes))
        draws = resampled(sizes, shares, **layout)
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


# -- packed rows -------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 7)), min_size=1, max_size=120)


def of(sizes: list[tuple[int, int]]) -> SampleLengths:
    tokens, tiles = np.array(sizes, np.int32).T
    return SampleLengths(tokens, tokens // 3, np.where(tokens > 0, tiles, 0))


@settings(deadline=None, max_examples=300)
@given(SIZES, st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_packed_rows_hold_every_sample_once_and_no_more_than_they_can(sizes, world, micro, accumulation, seed):
    lengths = of(sizes)
    layout = PlanLayout(
        seed, world, micro, accumulation, packed=True, max_tokens=100, max_tiles=7, cost=SampleCost(1, 2, 9, 0.1)
    )
    plan = plan_epoch(lengths, layout, epoch=seed)
    assert sorted(plan.samples.tolist()) == np.flatnonzero(lengths.tokens).tolist()
    if len(plan.samples):
        assert plan.totals(lengths.tokens).max() <= 100 and plan.totals(lengths.tiles).max() <= 7
    rows = plan.steps[plan.steps >= 0]
    assert sorted(rows) == list(range(len(plan.starts) - 1)) and not (plan.steps[:-1] < 0).any()
    assert plan.steps.shape == (-(-len(rows) // (world * micro * accumulation)), accumulation, world, micro)
    again = plan_epoch(lengths, layout, epoch=seed)
    assert all(np.array_equal(one, other) for one, other in zip(vars(plan).values(), vars(again).values(), strict=True))


@settings(deadline=None, max_examples=100)
@given(SIZES, st.integers(0, 9), st.booleans())
def test_the_rest_of_an_epoch_is_what_was_not_seen(sizes, steps, packed):
    """Whatever the layout that began, and the one that goes on."""
    lengths, number = of(sizes), len(sizes)
    began = plan_epoch(lengths, PlanLayout(0, 2, 1, 2, packed=packed, max_tokens=100, max_tiles=7), 3)
    seen = began.seen(min(steps, len(began)), number)
    rest = plan_epoch(lengths, PlanLayout(0, 3, 2, 1, packed=not packed, max_tokens=100, max_tiles=7), 3, seen=seen)
    assert np.array_equal(seen + rest.seen(len(rest), number), lengths.tokens > 0)


def test_seen_counts_the_samples_of_the_first_steps():
    plan = plan_epoch(lengths(500), PlanLayout(0, 2, 2, 2, packed=True, max_tokens=3000, max_tiles=12), 0)
    for steps in (0, 1, len(plan)):
        rows = [plan.row(row) for row in plan.steps[:steps].ravel()]
        expected = np.bincount([sample for row in rows for sample in row], minlength=500)
        assert np.array_equal(plan.seen(steps, 500), expected)
    assert plan.row(-1) == []


def test_rows_are_full_and_ranks_do_not_wait():
    sizes, cost = lengths(30_000), SampleCost(token=1, tile=1000, pair=1e-4)
    for world, waiting in ((8, 0.01), (64, 0.03)):
        layout = PlanLayout(0, world, 1, 1, packed=True, max_tokens=8192, max_tiles=40, cost=cost)
        plan = plan_epoch(sizes, layout, 0)
        assert packing_efficiency(plan, sizes, layout) > 0.99
        whole = EpochPlan(plan.samples, plan.starts, plan.steps[:-1])  # the last step has empty slots
        assert load_imbalance(whole, cost.of(sizes)) < waiting


def test_tiles_may_be_what_fills_a_row():
    sizes = lengths(5000)
    plan = plan_epoch(sizes, PlanLayout(0, 1, 1, 1, packed=True, max_tokens=100_000, max_tiles=12), 0)
    tiles = plan.totals(sizes.tiles)
    assert tiles.max() == 12 and np.mean(tiles[tiles > 0] == 12) > 0.95


def test_packed_rows_come_in_random_order_with_changing_members():
    sizes = lengths(5000)
    layout = PlanLayout(0, 2, 1, 2, packed=True, max_tokens=3000, max_tiles=12, cost=SampleCost(1, 0, 1000))
    plans = [plan_epoch(sizes, layout, epoch) for epoch in range(2)]
    cost = [plan.totals(layout.cost.of(sizes))[plan.steps[:-1]].mean(axis=(1, 2, 3)) for plan in plans]
    assert abs(np.corrcoef(cost[0].argsort().argsort(), np.arange(len(cost[0])))[0, 1]) < 0.2
    rows = [{frozenset(plan.row(row)) for row in range(len(plan.starts) - 1)} for plan in plans]
    assert len(rows[0] & rows[1]) < 0.1 * len(rows[0])
