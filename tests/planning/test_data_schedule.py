"""Resume at any position, in any layout, on changed data."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl.planning.data_schedule import DataSchedule
from internvl.planning.epoch_plan import PlanLayout, SampleCost, make_sample_lengths

ROW_LIMITS = {"max_tokens": 900, "max_tiles": 9}


def make_samples(num_samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make random lengths and digests."""
    rng = np.random.default_rng(seed)
    tokens, tiles = rng.integers(1, 800, num_samples), rng.integers(0, 9, num_samples)
    digests = rng.integers(-(2**31), 2**31, num_samples).astype(np.int32)
    return make_sample_lengths(tokens, tokens // 2, tiles), digests


def make_longer(lengths: np.ndarray) -> np.ndarray:
    longer = lengths.copy()
    longer["tokens"] += 1
    return longer


def draw_layouts():
    sizes = [st.integers(1, 3)] * 3
    return st.builds(
        lambda seed, world, micro, accumulation, packed, grouped: PlanLayout(
            seed, world, micro, accumulation, grouped, packed, **ROW_LIMITS, sample_cost=SampleCost(1, 2, 3, 0.5)
        ),
        st.integers(0, 2),
        *sizes,
        st.booleans(),
        st.booleans(),
    )


def through_json(state: dict) -> dict:
    return json.loads(json.dumps(state))


def count_seen(schedule: DataSchedule, epoch: int, start: int, stop: int) -> np.ndarray:
    """Count how often each sample is in some steps of an epoch."""
    plan, num_samples = schedule.plan(epoch), len(schedule.digests)
    return plan.count_seen(stop, num_samples) - plan.count_seen(start, num_samples)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 60), st.lists(st.tuples(draw_layouts(), st.integers(0, 6)), min_size=1, max_size=4), st.booleans()
)
def test_every_sample_is_seen_once_per_epoch_however_often_the_layout_changes(num_samples, runs, weighted):
    lengths, digests = make_samples(num_samples)
    weights = np.repeat([1.0, 3.0], [num_samples // 2, num_samples - num_samples // 2]) if weighted else None
    seen, state = {}, None
    for layout, num_steps in [*runs, (runs[0][0], 10**6)]:
        schedule = DataSchedule(lengths, digests, layout, weights)
        epoch, step = schedule.resume_from(through_json(state)) if state else (0, 0)
        for _ in range(num_steps):
            if epoch == 2:
                break
            seen[epoch] = seen.get(epoch, 0) + count_seen(schedule, epoch, step, step + 1)
            step += 1
            if step == schedule.count_epoch_steps(epoch):
                epoch, step = epoch + 1, 0
        state = schedule.state_dict(epoch, step)
    # With weights, the seed that an epoch started with determines which samples are drawn.
    for epoch, times in seen.items():
        assert times.sum() == num_samples, epoch
        assert weighted or (times == 1).all()


def test_resuming_in_the_same_layout_continues_the_same_plan():
    lengths, digests = make_samples(200)
    for packed in (False, True):
        layout = PlanLayout(0, 2, 1, 2, packed=packed, **ROW_LIMITS)
        unbroken = DataSchedule(lengths, digests, layout)
        for epoch, step in ((0, 0), (0, 3), (1, 5)):
            resumed = DataSchedule(lengths, digests, layout)
            assert resumed.resume_from(through_json(unbroken.state_dict(epoch, step))) == (epoch, step)
            assert np.array_equal(resumed.plan(epoch).steps, unbroken.plan(epoch).steps)
            assert np.array_equal(resumed.plan(epoch).samples, unbroken.plan(epoch).samples)
            assert resumed.state_dict(epoch, step + 1) == unbroken.state_dict(epoch, step + 1)
        last = unbroken.count_epoch_steps(1)
        assert DataSchedule(lengths, digests, layout).resume_from(unbroken.state_dict(1, last)) == (2, 0)


def test_data_id_depends_on_data_only():
    lengths, digests = make_samples(50)
    data_id = DataSchedule(lengths, digests, PlanLayout(0, 1, 1, 1)).data_id
    assert data_id == DataSchedule(lengths, digests, PlanLayout(5, 2, 2, 2, packed=True, **ROW_LIMITS)).data_id
    others = [(make_longer(lengths), digests, None), (lengths, digests + 1, None), (lengths, digests, np.ones(50))]
    other_ids = {DataSchedule(*data, PlanLayout(0, 1, 1, 1), weights).data_id for *data, weights in others}
    assert len(other_ids | {data_id}) == 4


@pytest.mark.parametrize("packed", [False, True])
def test_changed_data_resumes_with_unseen_samples(packed):
    """10 samples are removed, 20 inserted; all are seen once."""
    lengths, digests = make_samples(200)
    layout = PlanLayout(0, 2, 1, 2, packed=packed, **ROW_LIMITS)
    old = DataSchedule(lengths, digests, layout)
    seen_before = count_seen(old, 1, 0, 8)
    state = old.state_dict(1, 8)

    kept = np.sort(np.random.default_rng(1).permutation(200)[:190])
    place = np.sort(np.random.default_rng(2).integers(0, 190, 20))
    new_lengths, new_digests = make_samples(20, seed=5)
    lengths_after = np.insert(lengths[kept], place, new_lengths)
    digests_after = np.insert(digests[kept], place, new_digests)
    new = DataSchedule(lengths_after, digests_after, PlanLayout(0, 3, 1, 1, packed=packed, **ROW_LIMITS))
    assert new.describe_changes(old) == "20 of 210 samples are new, 10 of the previous 200 are removed"
    other_lengths = DataSchedule(make_longer(lengths), digests, layout)
    assert other_lengths.describe_changes(old).startswith("same samples in another order, of other lengths")
    epoch, step = new.resume_from(state, lambda data_id: DataSchedule(lengths, digests, layout))
    assert (epoch, step) == (1, 8)
    seen_before = np.insert(seen_before[kept], place, 0)
    assert np.array_equal(seen_before + count_seen(new, 1, 8, new.count_epoch_steps(1)), np.ones(210))

    # Interrupted once more, and resumed in yet another layout: the data before the change is loaded again.
    state = through_json(new.state_dict(1, 13))
    third = DataSchedule(lengths_after, new.digests, PlanLayout(0, 1, 2, 2, packed=packed, **ROW_LIMITS))
    assert third.resume_from(state, lambda data_id: DataSchedule(lengths, digests, layout)) == (1, 13)
    seen = seen_before + count_seen(new, 1, 8, 13) + count_seen(third, 1, 13, third.count_epoch_steps(1))
    assert np.array_equal(seen, np.ones(210))
    assert count_seen(third, 2, 0, third.count_epoch_steps(2)).tolist() == [1] * 210


def test_samples_of_equal_content_share_their_counts():
    ones = np.ones(6, np.int32)
    layout = PlanLayout(0, 1, 1, 1)
    schedule = DataSchedule(make_sample_lengths(ones, ones, ones), np.array([9, 7, 5, 7, 9, 9]), layout)
    digests, seen = np.array([7, 7, 7, 8, 9, 9]), np.array([1, 0, 1, 1, 1, 0])
    assert schedule.match_seen(digests, seen).tolist() == [1, 1, 0, 1, 0, 0]
