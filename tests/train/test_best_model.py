"""What a checkpoint, which is untrusted, says about the best model and early stopping."""

import json
from pathlib import Path

import pytest

from internvl.arguments.training import parse_args
from internvl.train.best_model import COMPARED_FLAGS, BestModelRecord, read_best_model

FLAGS = "--eval_strategy steps --eval_steps 1 --metric_for_best_model loss --early_stopping_patience 3".split()
STATE = {
    "global_step": 4,
    "best_global_step": 2,
    "best_metric": 0.5,
    "best_model_checkpoint": "/elsewhere/checkpoint-2",
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    args = parse_args(["--output_dir", str(tmp_path), *FLAGS])[2]
    flags = {name: getattr(args, name) for name in COMPARED_FLAGS}
    record = {"flags": flags, "world_size": 1, "versions": {}, "changes": []}
    (tmp_path / "checkpoint-4/flags.json").write_text(json.dumps(record))
    return tmp_path / "checkpoint-4"


def read(checkpoint: Path, state: dict, *flags: str) -> BestModelRecord:
    (checkpoint / "trainer_state.json").write_text(json.dumps(STATE | state))
    args = parse_args(["--output_dir", str(checkpoint.parent), *FLAGS, *flags])[2]
    return read_best_model(checkpoint, args)


def count(value) -> dict:
    attributes = {"early_stopping_patience_counter": value}
    return {"stateful_callbacks": {"EarlyStoppingCallback": {"args": {}, "attributes": attributes}}}


def test_best_checkpoint_is_beside_the_resumed_one(checkpoint):
    best = checkpoint.parent / "checkpoint-2"
    assert read(checkpoint, count(2)) == BestModelRecord(best, 2, is_comparable=True)
    assert read(checkpoint, {}) == BestModelRecord(best, 0, is_comparable=True)


def test_removed_best_checkpoint_is_reported(checkpoint, caplog):
    (checkpoint.parent / "checkpoint-2").rmdir()
    assert read(checkpoint, count(1)) == BestModelRecord(None, 1, is_comparable=True)
    assert "checkpoint-2 of step 2 does not exist any more" in caplog.text


@pytest.mark.parametrize(
    "flags", [["--greater_is_better", "True"], ["--metric_for_best_model", "perplexity"], ["--eval_share", "0.1"]]
)
def test_another_metric_or_evaluation_set_is_not_comparable(checkpoint, flags):
    assert read(checkpoint, count(2), *flags) == BestModelRecord(None, 0, is_comparable=False)


INVALID = {
    "path": (
        {"best_model_checkpoint": "../../x"},
        "best_model_checkpoint is '../../x', expected a path of a checkpoint",
    ),
    "step": ({"best_global_step": 5}, "best_global_step is 5, expected at most global_step 4"),
    "fraction": ({"best_global_step": 1.5}, "best_global_step is 1.5, expected an integer >= 1"),
    "metric": ({"best_metric": "0.5"}, "best_metric is '0.5', expected a finite number"),
    "counter": (count(5), "EarlyStoppingCallback is .*, expected an early_stopping_patience_counter"),
    "negative counter": (count(-1), "EarlyStoppingCallback is "),
    "no counter": ({"stateful_callbacks": {"EarlyStoppingCallback": [1]}}, "EarlyStoppingCallback is "),
}


@pytest.mark.parametrize(("state", "message"), INVALID.values(), ids=INVALID)
def test_invalid_values_are_refused(checkpoint, state, message):
    with pytest.raises(ValueError, match=f"trainer_state.json is invalid: {message}"):
        read(checkpoint, state)
