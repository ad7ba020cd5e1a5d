"""internvl/evaluation/results.py: the files of an evaluation, written and read."""

import json
import math
import os

import pytest

from internvl.evaluation import results
from internvl.evaluation.results import (
    EVALUATION_METRICS_FILE,
    PREDICTIONS_FILE,
    read_metrics,
    read_predictions,
    write_results,
)

PREDICTION = {
    "set": "docs",
    "line": 3,
    "file": "/data/docs.jsonl",
    "question": "Wie heißt er?",
    "references": ["Grün"],
    "prediction": "grün",
    "metric": "exact_match",
    "score": 1.0,
    "loss": 0.5,
    "tokens": 2,
    "correct": 1,
}
CONTENT = {"step": 50, "metrics": {"eval/docs/loss": 0.5}, "sets": {"docs": {"samples": 1}}, "seconds": {"loss": 1.5}}


@pytest.fixture
def folder(tmp_path):
    write_results(tmp_path / "step-50", [PREDICTION, PREDICTION | {"line": 4, "prediction": None}], CONTENT)
    return tmp_path / "step-50"


def test_files_are_read_as_written(folder):
    assert read_predictions(folder) == [PREDICTION, PREDICTION | {"line": 4, "prediction": None}]
    assert read_metrics(folder) == CONTENT
    assert sorted(os.listdir(folder)) == [EVALUATION_METRICS_FILE, PREDICTIONS_FILE]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    metrics = {"eval/loss": math.nan, "eval/perplexity": math.inf, "eval/docs/loss": 1.0}
    write_results(tmp_path, [PREDICTION | {"loss": math.nan, "box": [1.0, -math.inf]}], CONTENT | {"metrics": metrics})
    [line] = (tmp_path / PREDICTIONS_FILE).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == PREDICTION | {"loss": None, "box": [1.0, None]}
    read = read_metrics(tmp_path)["metrics"]
    assert math.isnan(read["eval/loss"]) and math.isnan(read["eval/perplexity"]) and read["eval/docs/loss"] == 1.0


def test_an_interrupted_evaluation_leaves_no_metrics(folder):
    def make_predictions():
        yield PREDICTION
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_results(folder, make_predictions(), CONTENT)
    assert not (folder / EVALUATION_METRICS_FILE).exists() and len(read_predictions(folder)) == 2  # those of before
    write_results(folder, [PREDICTION], CONTENT)
    assert read_predictions(folder) == [PREDICTION]
    assert sorted(os.listdir(folder)) == [EVALUATION_METRICS_FILE, PREDICTIONS_FILE]


DAMAGED_PREDICTIONS = {
    "not JSON": ("{", "line 1 is not JSON"),
    "deep": ("[" * 100_000, "line 1 is not JSON"),
    "no object": ("[1]", "line 1 is invalid: expected an object, got [1]"),
    "a key is missing": (
        json.dumps({**PREDICTION, "x": 1}).replace("prediction", "p"),
        "prediction must be str or null",
    ),
    "a type is wrong": (json.dumps(PREDICTION | {"line": "3"}), "'line' must be int, got '3'"),
    "NaN": (json.dumps(PREDICTION | {"score": True}), "'score' must be int or float or null, got True"),
    "empty": ("", "it has no lines"),
    "latin": (b"\xff\xfe", "line 1 is not JSON"),
}


@pytest.mark.parametrize("content, message", DAMAGED_PREDICTIONS.values(), ids=DAMAGED_PREDICTIONS)
def test_damaged_predictions_are_reported_with_their_line(tmp_path, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / PREDICTIONS_FILE).write_bytes(content + b"\n" if content else b"")
    with pytest.raises(ValueError) as info:
        read_predictions(tmp_path)
    assert message.replace("'", "") in str(info.value).replace("'", "") and "\n" not in str(info.value)


DAMAGED_METRICS = {
    "not JSON": ("{", "is not JSON"),
    "no object": ("[]", "expected a JSON object"),
    "no metrics": ('{"step": 1, "sets": {}}', "'metrics' must be dict, got nothing"),
    "text as metric": ('{"step": 1, "sets": {}, "metrics": {"a": "1"}}', "'a' must be int or float or null, got '1'"),
    "list as set": ('{"step": 1, "sets": {"a": []}, "metrics": {}}', "'a' must be dict, got []"),
    "text as step": ('{"step": "1", "sets": {}, "metrics": {}}', "'step' must be int or null, got '1'"),
}


@pytest.mark.parametrize("content, message", DAMAGED_METRICS.values(), ids=DAMAGED_METRICS)
def test_damaged_metrics_are_reported(tmp_path, content, message):
    (tmp_path / EVALUATION_METRICS_FILE).write_text(content)
    with pytest.raises(ValueError) as info:
        read_metrics(tmp_path)
    assert message in str(info.value) and EVALUATION_METRICS_FILE in str(info.value)


def test_only_regular_files_of_limited_size_are_read(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        read_predictions(tmp_path)
    os.mkfifo(tmp_path / PREDICTIONS_FILE)
    with pytest.raises(OSError, match="is a FIFO"):
        read_predictions(tmp_path)
    (tmp_path / PREDICTIONS_FILE).unlink()
    write_results(tmp_path, [PREDICTION], CONTENT)
    monkeypatch.setattr(results, "MAX_LINE_BYTES", 100)
    with pytest.raises(ValueError, match="line 1 is invalid: it has more than 100 bytes"):
        read_predictions(tmp_path)
    monkeypatch.setattr(results, "MAX_PREDICTIONS_BYTES", 100)
    with pytest.raises(OSError, match="more than 100"):
        read_predictions(tmp_path)
