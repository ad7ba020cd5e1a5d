"""Rows of an evaluation, and the estimated time of all evaluations of a run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.evaluation_cases import make_settings, open_evaluation_sets, write_evaluation_sets
from helpers.tiny_models import TINY_LLM, TINY_LLMS, TINY_VITS

from internvl.evaluation.evaluation_cost import (
    DeviceSpeed,
    count_evaluations,
    describe_model_cost,
    estimate_evaluation,
    estimate_step_seconds,
    format_evaluation_plan,
    measure_device_speed,
)
from internvl.evaluation.evaluation_data import EvaluationSet
from internvl.evaluation.evaluation_plan import plan_evaluation
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.planning.epoch_plan import PlanLayout, make_sample_lengths, plan_epoch
from internvl.planning.sample_cost import (
    build_model_without_weights,
    compute_forward_cost,
    compute_sample_cost,
    count_forward_flops,
)


def make_lengths(num_samples: int, max_tokens: int = 200, max_tiles: int = 6) -> np.ndarray:
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, max_tokens, num_samples)
    return make_sample_lengths(tokens, tokens // 4, rng.integers(0, max_tiles, num_samples))


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 64])
def test_every_sample_is_in_one_row_within_the_limits(world_size):
    lengths, settings = make_lengths(100), make_settings(max_tokens=512, max_tiles=16)
    lengths[[3, 50]] = 0
    plan = plan_evaluation(lengths, settings, world_size)
    assert sorted(plan.samples.tolist()) == [n for n in range(100) if n not in (3, 50)]
    assert plan.sum_per_row(lengths["tokens"]).max() <= 512 and plan.sum_per_row(lengths["tiles"]).max() <= 16
    assert plan.steps.shape == (-(-plan.num_rows // world_size), 1, world_size, 1)
    assert sorted(row for row in plan.steps.ravel().tolist() if row >= 0) == list(range(plan.num_rows))


@pytest.mark.parametrize(("tokens", "tiles"), [(900, 2), (100, 40), (900, 40), (513, 0)])
def test_sample_larger_than_a_row_has_its_own(tokens, tiles):
    lengths = make_lengths(60)
    lengths[7] = tokens, 5, tiles
    before = lengths.copy()
    plan = plan_evaluation(lengths, make_settings(max_tokens=512, max_tiles=16), 2)
    rows = [plan.get_row_samples(row) for row in range(plan.num_rows)]
    assert [7] in rows and sorted(plan.samples.tolist()) == list(range(60))
    assert (lengths == before).all()


def test_the_plan_is_the_same_in_every_evaluation():
    lengths = make_lengths(100)
    one, other = (plan_evaluation(lengths, make_settings(), 3) for _ in range(2))
    assert (one.samples == other.samples).all() and (one.steps == other.steps).all()


# -- number of evaluations ---------------------------------------------------------------------------------------------

COUNTS = [  # flags, steps of the run, steps of an epoch, evaluations
    ({"eval_strategy": "no"}, 100, 10, 0),
    ({"eval_strategy": "no", "eval_on_start": True}, 100, 10, 1),
    ({"eval_strategy": "no", "do_train": False, "do_eval": True}, 100, 10, 1),
    ({"eval_strategy": "steps", "eval_steps": 50}, 400, 100, 8),
    ({"eval_strategy": "steps", "eval_steps": 50, "eval_on_start": True}, 399, 100, 8),
    ({"eval_strategy": "steps", "eval_steps": None, "logging_steps": 20}, 100, 100, 5),
    ({"eval_strategy": "steps", "eval_steps": 0.1}, 95, 100, 9),  # every 10 steps
    ({"eval_strategy": "steps", "eval_steps": 10, "eval_delay": 35}, 100, 100, 7),  # 40, 50, ..., 100
    ({"eval_strategy": "epoch"}, 100, 40, 3),  # an epoch that ends early is evaluated, too
    ({"eval_strategy": "epoch", "eval_delay": 2}, 100, 40, 2),
]


@pytest.mark.parametrize(("flags", "num_steps", "steps_per_epoch", "expected"), COUNTS)
def test_evaluations_of_a_run(flags, num_steps, steps_per_epoch, expected):
    defaults = {"do_train": True, "do_eval": False, "eval_on_start": False, "eval_delay": 0, "logging_steps": 500}
    args = SimpleNamespace(**defaults | {"eval_steps": None} | flags)
    assert count_evaluations(args, num_steps, steps_per_epoch) == expected


# -- time --------------------------------------------------------------------------------------------------------------

FLOPS_ONLY = DeviceSpeed(flops=1e12, num_bytes=1e30, seconds_per_call=0)


@pytest.fixture(scope="module")
def model():
    config = InternVLChatConfig(
        TINY_VITS["300M"], TINY_LLM | TINY_LLMS["qwen2"], template="internvl2_5", force_image_size=56
    )
    return build_model_without_weights(config)


@pytest.fixture(scope="module")
def cost(model):
    return describe_model_cost(model, compute_sample_cost(model), compute_forward_cost(model))


@pytest.fixture
def data(goldens, tmp_path):
    write_evaluation_sets(tmp_path)
    return open_evaluation_sets(tmp_path, goldens / "tokenizer")


def test_losses_take_the_flops_of_a_forward_pass(model, cost, data):
    estimate = estimate_evaluation(data, make_settings(), 1, cost, FLOPS_ONLY)
    lengths = data.lengths
    counted = count_forward_flops(model.config).count(
        lengths["tokens"].tolist(), int(lengths["loss_tokens"].sum()), int(lengths["tiles"].sum())
    )
    assert estimate.loss_seconds * 1e12 == pytest.approx(counted, rel=1e-3)
    assert estimate.num_questions == estimate.num_decoding_steps == estimate.answer_seconds == 0
    assert estimate.num_passes == estimate.num_rows


def test_losses_take_less_time_on_more_ranks(cost, data):
    seconds = [
        estimate_evaluation(data, make_settings(max_tokens=200), n, cost, FLOPS_ONLY).loss_seconds for n in (1, 2, 4)
    ]
    assert seconds[0] > seconds[1] > seconds[2] >= seconds[0] / 4


def test_an_epoch_takes_three_times_its_evaluation(cost):
    """All parameters are trained: a forward pass and two of its size backward."""
    lengths = make_lengths(64)
    layout = PlanLayout(0, 1, 1, 1, packed=True, max_tokens=512, max_tiles=16)
    plan = plan_epoch(lengths, layout, 0)
    training = len(plan) * estimate_step_seconds(plan, lengths, cost, FLOPS_ONLY)
    expected = 3 * cost.forward.compute(lengths).sum()
    expected -= cost.forward.per_loss_token * lengths["loss_tokens"].sum()  # the plan has no gradient of the head
    assert training * 1e12 == pytest.approx(expected, rel=1e-4)


def test_answers_take_a_step_per_token_of_the_longest_of_a_batch(cost, data):
    data = data._replace(sets=[EvaluationSet(entry.name, "anls") for entry in data.sets])
    reading = DeviceSpeed(flops=1e30, num_bytes=cost.llm_bytes, seconds_per_call=0)  # a second to read the weights
    lengths = data.lengths["loss_tokens"]
    estimates = [
        estimate_evaluation(data, make_settings(batch_size=size, max_new_tokens=1000), 1, cost, reading)
        for size in (1, 2, len(lengths))
    ]
    steps = [estimate.num_decoding_steps for estimate in estimates]
    assert steps[0] == lengths.sum() > steps[1] > steps[2] == lengths.max()
    assert [estimate.answer_seconds for estimate in estimates] == pytest.approx(steps)
    assert estimates[0].answer_length == pytest.approx(lengths.mean())
    short = estimate_evaluation(data, make_settings(batch_size=1, max_new_tokens=3), 1, cost, reading)
    assert short.num_decoding_steps == 3 * len(lengths)
    assert short.max_answer_seconds == short.answer_seconds
    assert estimates[0].max_answer_seconds == pytest.approx(1000 * len(lengths))
    few = estimate_evaluation(data, make_settings(batch_size=1, num_samples=1), 1, cost, reading)
    assert few.num_questions == len(data.sets)
    starting = DeviceSpeed(flops=1e30, num_bytes=1e30, seconds_per_call=1e-3)
    bound = estimate_evaluation(data, make_settings(batch_size=1, num_samples=1), 1, cost, starting)
    assert bound.answer_seconds > bound.num_decoding_steps * cost.num_llm_modules * 1e-3


def test_table_shows_shares_of_the_time(cost, data):
    sets = [data.sets[0]._replace(metric="anls"), *data.sets[1:]]
    data = data._replace(sets=sets)
    estimate = estimate_evaluation(data, make_settings(), 1, cost, FLOPS_ONLY)
    half = 10 * estimate.seconds / 100  # 100 steps take as long as 10 evaluations
    lines = format_evaluation_plan(data, estimate, 10, 100, half, "this device").splitlines()
    table = {line[:22].strip(): line[22:] for line in lines}
    assert table["evaluation sets"] == "one_tile (anls), tiles, texts, base"
    assert table["samples"] == f"{len(data.lengths)} (0 skipped)"
    assert table["evaluations"] == "10, each as long as 10.0 training steps"
    assert table["share of the time"].startswith("50.0% (estimated for this device): losses ")
    assert table["questions answered"].startswith("1, with references of ")


def test_speeds_of_this_device_are_positive():
    speed = measure_device_speed(torch.device("cpu"), torch.float32)
    assert speed.flops > 1e7 and speed.num_bytes > 1e7 and 1e-8 < speed.seconds_per_call < 1e-2
