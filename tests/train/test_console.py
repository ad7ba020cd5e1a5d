"""The line that a logging step prints."""

import re

import pytest

from internvl.train.console import format_duration, format_evaluation, format_step

LOGS = {
    "loss": 1.23456,
    "grad_norm": 0.51234,
    "learning_rate": 1e-4,
    "epoch": 0.25,
    "step_seconds": 0.5,
    "tokens_per_second": 12345.6,
    "data_wait_percent": 1.2,
    "peak_memory_gib": 10.25,
    "mfu_percent": 41.26,
    "forward_seconds": 0.1,
}


def test_step_is_one_line_of_labeled_columns():
    line = format_step(LOGS, step=40, max_steps=400)
    assert re.sub(" +", " ", line) == (
        "step 40/400 epoch 0.25 loss 1.2346 grad norm 0.512 lr 1.00e-04 tokens/s 12,346 MFU 41.3% step 0.50s "
        "data wait 1% memory 10.2GiB left 3:00"
    )


def test_columns_stay_in_place():
    other_logs = LOGS | {"loss": 11.5, "grad_norm": 2.0, "tokens_per_second": 980.0, "mfu_percent": 5.0}
    lines = [format_step(logs, step, 400) for logs, step in ((LOGS, 7), (other_logs, 395))]
    assert len({line.index("MFU") for line in lines}) == len({line.index("left") for line in lines}) == 1


def test_missing_metrics_are_left_out():
    line = format_step({"loss": 2.0, "skipped_steps": 3, "rewards/accuracies": 0.75}, 1, 9)
    assert re.sub(" +", " ", line) == "step 1/9 loss 2.0000 reward accuracy 0.75 skipped 3"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (127.4, "2:07"), (3727, "1:02:07"), (273900, "3d 04:05")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_evaluation_has_a_line_per_set_and_one_for_all():
    metrics = {
        "eval_loss": 1.5,
        "eval_rewards/accuracies": 0.75,
        "eval_docvqa/loss": 1.25,
        "eval_docvqa/anls": 0.8,
        "eval_docvqa/anls_low": 0.75,
        "eval_docvqa/anls_high": 0.85,
        "eval_docvqa/hard/loss": 2.0,
        "eval_seconds": 62.0,
    }
    assert format_evaluation(metrics, ["docvqa", "docvqa/hard"], 50) == [
        "evaluation at step 50: docvqa/hard  loss 2.0000",
        "evaluation at step 50: docvqa  loss 1.2500  anls 0.8000 [0.7500, 0.8500]",
        "evaluation at step 50: all sets  loss 1.5000  rewards/accuracies 0.7500  took 1:02",
    ]
