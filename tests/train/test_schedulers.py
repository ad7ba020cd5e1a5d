"""Every learning rate scheduler gives the same rates without DeepSpeed, under each ZeRO stage and after resuming."""

import json
import shutil

import pytest
from helpers.paths import TESTS_DIR
from helpers.training_runs import TRAIN_ADAPTERS, ZERO_FLAGS, read_step_logs, run_training

from internvl.arguments.schedulers import STEP_SCHEDULERS

PROGRAM = TESTS_DIR / "programs/scheduler_rates.py"
WAYS = {**ZERO_FLAGS, "offload": ["--deepspeed", "zero_stage3_config_100b_1e7_offload.json"]}
ONE_STEP = [*TRAIN_ADAPTERS, *"--backbone_lr 3e-3 --max_steps 1 --save_strategy no --no_smoke_save".split()]


def list_rates(tiny_inputs, output, flags: list[str]) -> dict[str, list[list[float]]]:
    run_training(tiny_inputs, output, *ONE_STEP, *flags, entry=PROGRAM)
    return json.loads((output / "rates.json").read_text())


@pytest.fixture(scope="module")
def expected_rates(tiny_inputs, tmp_path_factory):
    return list_rates(tiny_inputs, tmp_path_factory.mktemp("rates") / "out", [])


@pytest.mark.multiprocess
def test_schedulers_differ_and_keep_the_ratio_of_the_parts(expected_rates):
    assert expected_rates.keys() == set(STEP_SCHEDULERS)
    for rates in expected_rates.values():
        assert all(vision == pytest.approx(3 * llm) for vision, llm in rates)
    assert len({json.dumps(rates) for rates in expected_rates.values()}) == len(STEP_SCHEDULERS)
    llm_rates = {name: [rate for _, rate in rates] for name, rates in expected_rates.items()}
    assert llm_rates["constant"] == [1e-3] * 10
    assert llm_rates["linear"] == pytest.approx(
        [0, 1e-3 / 3, 2e-3 / 3, *(1e-3 * (10 - step) / 7 for step in range(3, 10))]
    )
    assert llm_rates["polynomial"][5] == pytest.approx((1e-3 - 1e-7) * (5 / 7) ** 2 + 1e-7)
    assert llm_rates["warmup_stable_decay"][3:7] == [1e-3] * 4
    assert min(llm_rates["cosine_with_min_lr"][3:]) > 1e-4


@pytest.mark.multiprocess
@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"none"}))
def test_rates_are_equal_under_deepspeed(tiny_inputs, expected_rates, tmp_path, way):
    assert list_rates(tiny_inputs, tmp_path / "out", WAYS[way]) == expected_rates


RESUMED = {
    "polynomial": ["--deepspeed", "zero_stage2_config.json"],
    "cosine_with_min_lr": ["--deepspeed", "zero_stage3_config.json", "--lr_scheduler_kwargs", '{"min_lr": 1e-4}'],
    "warmup_stable_decay": ["--lr_scheduler_kwargs", '{"num_decay_steps": 2}'],
    "inverse_sqrt": ["--deepspeed", "zero_stage1_config.json"],
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_has_the_same_rates(tiny_inputs, tmp_path, name):
    flags = [*TRAIN_ADAPTERS, "--lr_scheduler_type", name, "--warmup_steps", "2", *RESUMED[name]]
    run_training(tiny_inputs, tmp_path / "unbroken", *flags)
    shutil.copytree(tmp_path / "unbroken/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    run_training(tiny_inputs, tmp_path / "resumed", *flags)
    unbroken, resumed = (
        [(step["learning_rate"], step["loss"]) for step in read_step_logs(tmp_path / run)]
        for run in ("unbroken", "resumed")
    )
    assert resumed == unbroken and len({rate for rate, _ in unbroken}) > 2
