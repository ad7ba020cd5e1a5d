"""Properties of epoch plans, over many seeds and sizes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl.planning.bin_packing import pack_samples
from internvl.planning.epoch_plan import EpochPlan, PlanLayout, SampleCost, make_sample_lengths, plan_epoch
from internvl.planning.plan_report import compute_load_imbalance, compute_packing_efficiency, format_epoch_plan

CASES = [
    (n, world, micro, accumulation, grouped)
    for n, world, micro, accumulation in itertools.product([1, 2, 7, 64, 253], [1, 2, 5], [1, 3], [1, 4])
    for grouped in (False, True)
]


def make_lengths(n: int, seed: int = 0, usable: np.ndarray | bool = True) -> np.ndarray:
    """Make random lengths, half images and half text.

    Images have 260 tokens per tile. Lengths are 0 where a sample is not usable.
    """
    rng = np.random.default_rng(seed)
    tiles = rng.integers(1, 6, n) * (rng.random(n) < 0.5)
    tokens = tiles * 260 + np.minimum(rng.lognormal(5, 0.8, n), 1500).astype(int) + 2
    return make_sample_lengths(*(np.where(usable, values, 0) for values in (tokens, tokens // 2, tiles)))


def get_step_samples(plan: EpochPlan) -> np.ndarray:
    """Return the sample in each slot, for rows of one sample."""
    return np.append(plan.samples, -1)[plan.steps]


def plan_steps(n, world, micro, accumulation, grouped, seed=0, epoch=0, usable=True) -> np.ndarray:
    layout = PlanLayout(seed, world, micro, accumulation, group_by_length=grouped)
    return get_step_samples(plan_epoch(make_lengths(n, usable=usable), layout, epoch))


@pytest.mark.parametrize("usable_share", [1.0, 0.7])
def test_every_usable_sample_once_in_as_few_steps_as_possible(usable_share):
    for case, seed in itertools.product(CASES, range(3)):
        n, world, micro, accumulation, _ = case
        usable = np.random.default_rng(seed).random(n) < usable_share
        usable[0] = True
        steps = plan_steps(*case, seed=seed, usable=usable if usable_share < 1 else True)
        expected = np.flatnonzero(usable) if usable_share < 1 else np.arange(n)
        assert sorted(steps[steps >= 0]) == expected.tolist(), case
        assert steps.dtype == np.int64
        assert steps.shape == (-(-len(expected) // (world * micro * accumulation)), accumulation, world, micro), case


def test_only_the_last_step_has_empty_slots_spread_over_ranks_and_micro_batches():
    for case in CASES:
        steps = plan_steps(*case)
        empty = steps < 0
        assert not empty[:-1].any(), case
        per_rank = empty[-1].sum(axis=(0, 2))
        assert per_rank.max() - per_rank.min() <= 1, case
        filled = (~empty[-1]).sum(axis=2)  # (accumulation, world)
        assert filled.max() - filled.min() <= 1, case


def test_plan_is_determined_by_seed_and_epoch():
    for grouped in (False, True):
        base = plan_steps(253, 2, 3, 4, grouped, seed=3, epoch=1)
        assert np.array_equal(base, plan_steps(253, 2, 3, 4, grouped, seed=3, epoch=1))
        assert not np.array_equal(base, plan_steps(253, 2, 3, 4, grouped, seed=3, epoch=2))
        assert not np.array_equal(base, plan_steps(253, 2, 3, 4, grouped, seed=4, epoch=1))


def test_order_without_grouping_is_a_uniform_shuffle():
    positions = np.array([np.argsort(plan_steps(60, 2, 3, 1, False, seed=seed).ravel()) for seed in range(400)])
    # The mean position of each sample over 400 epochs: 29.5 with a standard error of 0.87.
    assert np.abs(positions.mean(axis=0) - 29.5).max() < 4.5


def measure_padding(steps: np.ndarray, tokens: np.ndarray) -> float:
    """Measure the share of padding in micro-batches padded to their longest sample."""
    table = np.where(steps >= 0, tokens[steps], 0)
    return 1 - table.sum() / (table.max(axis=-1) * table.shape[-1]).sum()


def measure_imbalance(steps: np.ndarray, tokens: np.ndarray) -> float:
    """Measure the mean load imbalance of complete steps, by tokens."""
    load = np.where(steps >= 0, tokens[steps], 0).sum(axis=(1, 3))[:-1]
    return 1 - (load.mean(axis=1) / load.max(axis=1)).mean()


@pytest.mark.parametrize("world, micro, accumulation", [(8, 4, 2), (2, 8, 1), (4, 2, 8)])
def test_grouping_reduces_padding_and_load_imbalance(world, micro, accumulation):
    tokens = make_lengths(5000)["tokens"]
    random, grouped = (plan_steps(5000, world, micro, accumulation, flag) for flag in (False, True))
    assert measure_padding(grouped, tokens) < measure_padding(random, tokens) / 5
    assert measure_imbalance(grouped, tokens) < 0.004 < measure_imbalance(random, tokens) / 10


def test_grouped_steps_come_in_random_order_with_changing_members():
    tokens = make_lengths(5000)["tokens"]
    means = {}
    members = {}
    for epoch in range(2):
        steps = plan_steps(5000, 2, 4, 2, True, epoch=epoch)[:-1]
        means[epoch] = tokens[steps].mean(axis=(1, 2, 3))
        members[epoch] = {frozenset(step.ravel().tolist()) for step in steps}
    ranks = means[0].argsort().argsort()
    assert abs(np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]) < 0.2, "steps must not run from long to short"
    assert len(members[0] & members[1]) < 0.05 * len(members[0]), (
        "samples must not have the same neighbors in every epoch"
    )


def test_the_incomplete_step_is_not_always_that_of_the_longest_or_shortest():
    tokens = make_lengths(1001)["tokens"]
    last = [
        tokens[step[step >= 0]].mean()
        for epoch in range(40)
        for step in plan_steps(1001, 2, 2, 2, True, epoch=epoch)[-1:]
    ]
    assert np.quantile(tokens, 0.2) < np.median(last) < np.quantile(tokens, 0.8) and np.std(last) > 50


# -- weights -----------------------------------------------------------------------------------------------------------


def count_draws(sizes: list[int], shares: list[float], epoch: int = 0, usable=True, **layout) -> np.ndarray:
    """Count draws per sample from datasets of these sizes and shares."""
    weights = np.repeat(np.array(shares) / sizes, sizes)
    plan = plan_epoch(
        make_lengths(len(weights), usable=usable), PlanLayout(0, 2, 3, 2, **layout), epoch, weights=weights
    )
    return plan.count_seen(len(plan), len(weights))


def sum_per_dataset(draws: np.ndarray, sizes: list[int]) -> np.ndarray:
    return np.add.reduceat(draws, np.cumsum([0, *sizes[:-1]]))


@pytest.mark.parametrize(
    "layout", [{}, {"group_by_length": True}, {"packed": True, "max_tokens": 3000, "max_tiles": 9}]
)
def test_draws_follow_the_weights_exactly(layout):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sizes = rng.permutation(np.arange(1, 90))[: rng.integers(1, 7)].tolist()
        shares = np.sqrt(sizes) if seed % 2 else rng.lognormal(0, 2, len(sizes))
        draws = count_draws(sizes, shares, **layout)
        total = sum_per_dataset(draws, sizes)
        exact = shares / shares.sum() * sum(sizes)
        assert total.sum() == sum(sizes), "as many draws as samples"
        assert (np.floor(exact) <= total + 1e-6).all() and (total <= np.ceil(exact)).all()
        rounded_up = total > np.floor(exact + 1e-9)
        remainders = exact - np.floor(exact + 1e-9)
        assert remainders[rounded_up].min(initial=1) >= remainders[~rounded_up].max(initial=0) - 1e-9
        for part in np.split(draws, np.cumsum(sizes)[:-1]):
            assert part.max() - part.min() <= 1, "no sample is drawn again before every other has been drawn"


def test_equal_weights_draw_every_sample_once():
    assert (count_draws([7, 20, 5], [7, 20, 5]) == 1).all()
    assert (count_draws([50], [1]) == 1).all()


def test_unusable_samples_are_never_drawn():
    sizes = [30, 40, 10]
    usable = np.random.default_rng(0).random(80) < 0.6
    draws = count_draws(sizes, np.sqrt(sizes), usable=usable)
    assert not draws[~usable].any() and draws.sum() == usable.sum()
    usable[:30] = False
    draws = count_draws(sizes, np.sqrt(sizes), usable=usable)
    assert not draws[:30].any() and draws.sum() == usable.sum(), "a dataset without usable samples is dropped"
    assert not count_draws(sizes, [0, 1, 1])[:30].any()


def test_draws_change_with_the_epoch_and_are_uniform():
    sizes = [40, 10]
    epochs = np.array([count_draws(sizes, np.sqrt(sizes), epoch) for epoch in range(400)])
    assert np.array_equal(epochs[3], count_draws(sizes, np.sqrt(sizes), 3)) and not np.array_equal(epochs[3], epochs[4])
    total = sum_per_dataset(epochs[0], sizes)
    for part, expected in zip(np.split(epochs, [40], axis=1), total / sizes, strict=True):
        assert np.abs(part.mean(axis=0) - expected).max() < 4 * 0.5 / np.sqrt(400), "all samples equally often"


# -- packed rows -------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 7)), min_size=1, max_size=120)


def to_lengths(sizes: list[tuple[int, int]]) -> np.ndarray:
    tokens, tiles = np.array(sizes, np.int32).T
    return make_sample_lengths(tokens, tokens // 3, np.where(tokens > 0, tiles, 0))


@settings(deadline=None, max_examples=300)
@given(SIZES, st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_packed_rows_hold_every_sample_once_within_their_limits(sizes, world, micro, accumulation, seed):
    lengths = to_lengths(sizes)
    layout = PlanLayout(
        seed, world, micro, accumulation, packed=True, max_tokens=100, max_tiles=7, sample_cost=SampleCost(1, 2, 9, 0.1)
    )
    plan = plan_epoch(lengths, layout, epoch=seed)
    assert sorted(plan.samples.tolist()) == np.flatnonzero(lengths["tokens"]).tolist()
    if len(plan.samples):
        assert plan.sum_per_row(lengths["tokens"]).max() <= 100 and plan.sum_per_row(lengths["tiles"]).max() <= 7
    rows = plan.steps[plan.steps >= 0]
    assert sorted(rows) == list(range(plan.num_rows)) and not (plan.steps[:-1] < 0).any()
    assert plan.steps.shape == (-(-len(rows) // (world * micro * accumulation)), accumulation, world, micro)
    again = plan_epoch(lengths, layout, epoch=seed)
    assert all(np.array_equal(one, other) for one, other in zip(vars(plan).values(), vars(again).values(), strict=True))


@settings(deadline=None, max_examples=100)
@given(SIZES, st.integers(0, 9), st.booleans())
def test_the_rest_of_an_epoch_is_what_was_not_seen(sizes, steps, packed):
    """Whatever the layouts before and after."""
    lengths, number = to_lengths(sizes), len(sizes)
    began = plan_epoch(lengths, PlanLayout(0, 2, 1, 2, packed=packed, max_tokens=100, max_tiles=7), 3)
    seen = began.count_seen(min(steps, len(began)), number)
    rest = plan_epoch(lengths, PlanLayout(0, 3, 2, 1, packed=not packed, max_tokens=100, max_tiles=7), 3, seen=seen)
    assert np.array_equal(seen + rest.count_seen(len(rest), number), lengths["tokens"] > 0)


def test_count_seen_counts_the_samples_of_the_first_steps():
    plan = plan_epoch(make_lengths(500), PlanLayout(0, 2, 2, 2, packed=True, max_tokens=3000, max_tiles=12), 0)
    for steps in (0, 1, len(plan)):
        rows = [plan.get_row_samples(row) for row in plan.steps[:steps].ravel()]
        expected = np.bincount([sample for row in rows for sample in row], minlength=500)
        assert np.array_equal(plan.count_seen(steps, 500), expected)
    assert plan.get_row_samples(-1) == []


def test_packing_efficiency_and_load_imbalance():
    lengths, cost = make_lengths(30_000), SampleCost(per_token=1, per_tile=1000, per_token_pair=1e-4)
    for world, max_imbalance in ((8, 0.01), (64, 0.03)):
        layout = PlanLayout(0, world, 1, 1, packed=True, max_tokens=8192, max_tiles=40, sample_cost=cost)
        plan = plan_epoch(lengths, layout, 0)
        assert compute_packing_efficiency(plan, lengths, layout) > 0.99
        complete = EpochPlan(plan.samples, plan.row_starts, plan.steps[:-1])  # the last step has empty slots
        assert compute_load_imbalance(complete, cost.compute(lengths)) < max_imbalance


def test_tiles_may_be_the_limit_of_a_row():
    sizes = make_lengths(5000)
    plan = plan_epoch(sizes, PlanLayout(0, 1, 1, 1, packed=True, max_tokens=100_000, max_tiles=12), 0)
    tiles = plan.sum_per_row(sizes["tiles"])
    assert tiles.max() == 12 and np.mean(tiles[tiles > 0] == 12) > 0.95


def test_worked_example_of_bin_packing():
    """The example in the docstring of `bin_packing`."""
    tokens, tiles = np.array([6, 6, 3, 3, 1, 1]), np.array([2, 2, 0, 0, 0, 0])
    order, row_starts = pack_samples(tokens, tiles, max_tokens=10, max_tiles=4, rng=np.random.default_rng(0))
    assert row_starts.tolist() == [0, 3, 6]
    for row in np.split(order, row_starts[1:-1]):
        assert sorted(zip(tokens[row].tolist(), tiles[row].tolist(), strict=True)) == [(1, 0), (3, 0), (6, 2)]


def test_packed_rows_come_in_random_order_with_changing_members():
    sizes = make_lengths(5000)
    layout = PlanLayout(0, 2, 1, 2, packed=True, max_tokens=3000, max_tiles=12, sample_cost=SampleCost(1, 0, 1000))
    plans = [plan_epoch(sizes, layout, epoch) for epoch in range(2)]
    cost = [plan.sum_per_row(layout.sample_cost.compute(sizes))[plan.steps[:-1]].mean(axis=(1, 2, 3)) for plan in plans]
    assert abs(np.corrcoef(cost[0].argsort().argsort(), np.arange(len(cost[0])))[0, 1]) < 0.2
    rows = [{frozenset(plan.get_row_samples(row)) for row in range(plan.num_rows)} for plan in plans]
    assert len(rows[0] & rows[1]) < 0.1 * len(rows[0])


@pytest.mark.parametrize(
    ("world_size", "expected"), [(1, "1 row = 1 rank x 1 micro-batch x"), (2, "2 rows = 2 ranks x")]
)
def test_report_has_singular_and_plural(world_size, expected):
    lengths, layout = make_lengths(4), PlanLayout(0, world_size, 1, 1)
    report = format_epoch_plan(lengths, plan_epoch(lengths, layout, 0), layout, 0, np.zeros(4, np.int32))
    assert expected in report and "4 (1.0 samples per row)" in report
