"""Batches of a rank: the plan's rows from any position to the end of the run."""

import numpy as np
import pytest

from internvl.planning.batch_sampler import PlanBatchSampler, count_run_steps
from internvl.planning.data_schedule import DataSchedule
from internvl.planning.epoch_plan import SAMPLE_LENGTHS, PlanLayout

NUM_SAMPLES = 26


@pytest.fixture
def schedule() -> DataSchedule:
    """7 steps of 4 rows an epoch; 2 ranks, 2 rows a micro-batch, the last step half empty."""
    lengths = np.zeros(NUM_SAMPLES, SAMPLE_LENGTHS)
    lengths["tokens"] = np.arange(1, NUM_SAMPLES + 1)
    return DataSchedule(lengths, np.arange(NUM_SAMPLES), PlanLayout(0, 2, 2, 1))


def batches(schedule, rank, epoch=0, step=0, num_steps=7) -> list:
    return list(PlanBatchSampler(schedule, rank, epoch, step, num_steps))


def test_an_epoch_holds_every_sample_once_over_all_ranks(schedule):
    keys = [key for rank in (0, 1) for batch in batches(schedule, rank) for key in batch]
    assert {epoch for epoch, *_ in keys} == {0}
    assert sorted(sample for _, *samples in keys for sample in samples) == list(range(NUM_SAMPLES))
    assert all(len(batches(schedule, rank)) == 7 for rank in (0, 1)), "ranks take part in every step"


@pytest.mark.parametrize("rank", [0, 1])
def test_resuming_equals_the_rest_of_the_unbroken_run(schedule, rank):
    unbroken = batches(schedule, rank, num_steps=17)
    for done in (1, 6, 7, 8, 13):
        epoch, step = divmod(done, 7)
        assert batches(schedule, rank, epoch, step, 17 - done) == unbroken[done:]
    assert [batch[0][0] for batch in unbroken] == [0] * 7 + [1] * 7 + [2] * 3, "epochs follow without a break"


def test_a_finished_run_has_no_batch(schedule):
    assert batches(schedule, 0, num_steps=0) == batches(schedule, 0, num_steps=-2) == []


def test_the_length_is_unknown_so_that_transformers_counts_steps(schedule):
    with pytest.raises(TypeError):
        len(PlanBatchSampler(schedule, 0, 0, 0, 7))


@pytest.mark.parametrize(
    ("epoch", "steps_before", "num_train_epochs", "max_steps", "total"),
    [
        (0, 0, 1, -1, 7),
        (0, 0, 2.5, -1, 18),
        (0, 0, 0.1, -1, 1),
        (0, 0, 3, 5, 5),
        (2, 14, 3, -1, 21),
        (3, 21, 3, -1, 21),
    ],
)
def test_steps_of_a_run(schedule, epoch, steps_before, num_train_epochs, max_steps, total):
    assert count_run_steps(schedule, epoch, steps_before, num_train_epochs, max_steps) == total
