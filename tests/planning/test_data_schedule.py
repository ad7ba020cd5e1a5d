"""Laws of a schedule: wherever a run is interrupted, however it goes on, samples are seen as often as they should."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl.planning.data_schedule import DataSchedule
from internvl.planning.epoch_plan import PlanLayout, SampleCost, SampleLengths

ROOM = {"max_tokens": 900, "max_tiles": 9}


def data(number: int, seed: int = 0) -> tuple[SampleLengths, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens, tiles = rng.integers(1, 800, number).astype(np.int32), rng.integers(0, 9, number).astype(np.int32)
    return SampleLengths(tokens, tokens // 2, tiles), rng.integers(-(2**31), 2**31, number).astype(np.int32)


def layouts():
    sizes = [st.integers(1, 3)] * 3
    return st.builds(
        lambda seed, world, micro, accumulation, packed, grouped: PlanLayout(
            seed, world, micro, accumulation, grouped, packed, **ROOM, cost=SampleCost(1, 2, 3, 0.5)
        ),
        st.integers(0, 2),
        *sizes,
        st.booleans(),
        st.booleans(),
    )


def read(schedule: DataSchedule, epoch: int, start: int, stop: int) -> np.ndarray:
    """How often each sample is in these steps of an epoch."""
    plan, number = schedule.plan(epoch), len(schedule.digests)
    return plan.seen(stop, number) - plan.seen(start, number)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.lists(st.tuples(layouts(), st.integers(0, 6)), min_size=1, max_size=4), st.booleans())
def test_every_sample_once_an_epoch_however_often_the_layout_changes(number, runs, weighted):
    lengths, digests = data(number)
    weights = np.repeat([1.0, 3.0], [number // 2, number - number // 2]) if weighted else None
    seen, state = {}, None
    for layout, steps in [*runs, (runs[0][0], 10**6)]:
        schedule = DataSchedule(lengths, digests, layout, weights)
        epoch, step = schedule.go_on(json.loads(json.dumps(state))) if state else (0, 0)
        for _ in range(steps):
            if epoch == 2:
                break
            seen[epoch] = seen.get(epoch, 0) + read(schedule, epoch, step, step + 1)
            step += 1
            if step == schedule.steps(epoch):
                epoch, step = epoch + 1, 0
        state = schedule.state(epoch, step)
    # Which samples are drawn in an epoch is decided by the seed that it began with.
    for epoch, times in seen.items():
        assert times.sum() == number, epoch
        assert weighted or (times == 1).all()


def test_the_same_layout_goes_on_in_the_same_plan():
    lengths, digests = data(200)
    for packed in (False, True):
        layout = PlanLayout(0, 2, 1, 2, packed=packed, **ROOM)
        whole = DataSchedule(lengths, digests, layout)
        for epoch, step in ((0, 0), (0, 3), (1, 5)):
            again = DataSchedule(lengths, digests, layout)
            assert again.go_on(json.loads(json.dumps(whole.state(epoch, step)))) == (epoch, step)
            assert np.array_equal(again.plan(epoch).steps, whole.plan(epoch).steps)
            assert np.array_equal(again.plan(epoch).samples, whole.plan(epoch).samples)
            assert again.state(epoch, step + 1) == whole.state(epoch, step + 1)
        last = whole.steps(1)
        assert DataSchedule(lengths, digests, layout).go_on(whole.state(1, last)) == (2, 0)


def test_the_fingerprint_is_that_of_the_data():
    lengths, digests = data(50)
    base = DataSchedule(lengths, digests, PlanLayout(0, 1, 1, 1)).fingerprint
    assert base == DataSchedule(lengths, digests, PlanLayout(5, 2, 2, 2, packed=True, **ROOM)).fingerprint
    longer = lengths._replace(tokens=lengths.tokens + 1)
    others = [(longer, digests, None), (lengths, digests + 1, None), (lengths, digests, np.ones(50))]
    names = {
        DataSchedule(some, digest, PlanLayout(0, 1, 1, 1), weights).fingerprint for some, digest, weights in others
    }
    assert len(names | {base}) == 4


@pytest.mark.parametrize("packed", [False, True])
def test_changed_data_goes_on_with_what_was_not_seen_of_it(packed):
    """10 samples gone, 20 new ones between the others: the others are seen once in all, the new ones once."""
    lengths, digests = data(200)
    layout = PlanLayout(0, 2, 1, 2, packed=packed, **ROOM)
    old = DataSchedule(lengths, digests, layout)
    seen_before = read(old, 1, 0, 8)
    state = old.state(1, 8)

    kept = np.sort(np.random.default_rng(1).permutation(200)[:190])
    place = np.sort(np.random.default_rng(2).integers(0, 190, 20))
    fresh = data(20, seed=5)
    ours = SampleLengths(*(np.insert(a[kept], place, b) for a, b in zip(lengths, fresh[0], strict=True)))
    new = DataSchedule(ours, np.insert(digests[kept], place, fresh[1]), PlanLayout(0, 3, 1, 1, packed=packed, **ROOM))
    assert new.differences(old) == "20 of its 210 samples are new, 10 of the 200 before are gone"
    other_size = DataSchedule(lengths._replace(tokens=lengths.tokens + 1), digests, layout)
    assert other_size.differences(old).startswith("its samples are the same in another order, size")
    epoch, step = new.go_on(state, lambda name: DataSchedule(lengths, digests, layout))
    assert (epoch, step) == (1, 8)
    read_before = np.insert(seen_before[kept], place, 0)
    assert np.array_equal(read_before + read(new, 1, 8, new.steps(1)), np.ones(210))

    # Interrupted once more, in yet another layout: the data before the change is asked for again.
    state = json.loads(json.dumps(new.state(1, 13)))
    third = DataSchedule(ours, new.digests, PlanLayout(0, 1, 2, 2, packed=packed, **ROOM))
    assert third.go_on(state, lambda name: DataSchedule(lengths, digests, layout)) == (1, 13)
    seen = read_before + read(new, 1, 8, 13) + read(third, 1, 13, third.steps(1))
    assert np.array_equal(seen, np.ones(210)) and read(third, 2, 0, third.steps(2)).tolist() == [1] * 210


def test_equal_samples_share_what_was_seen_of_them():
    lengths = SampleLengths(*[np.ones(6, np.int32)] * 3)
    old = DataSchedule(lengths, np.array([7, 7, 7, 8, 9, 9]), PlanLayout(0, 1, 1, 1))
    assert DataSchedule(lengths, np.array([9, 7, 5, 7, 9, 9]), old.layout)._recognised(
        old.digests, np.array([1, 0, 1, 1, 1, 0])
    ).tolist() == [1, 1, 0, 1, 0, 0]
