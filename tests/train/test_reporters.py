"""Reporters show the same keys of evaluations, each in its offline mode.

TensorBoard is required. The others are not, and their tests are skipped without them: `python3 -m pip install wandb
mlflow-skinny trackio "swanlab<0.8"` (transformers 5.24 does not support swanlab 0.8 and later).
"""

import json
import sqlite3
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.evaluation_runs import read_evaluations, write_evaluation_meta
from helpers.training_runs import TRAIN_ADAPTERS, read_losses, run_training

Scalars = dict[str, dict[int, float]]  # key -> step -> value


def read_tensorboard(output: Path) -> Scalars:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in output.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    return {key: {event.step: event.value for event in events.Scalars(key)} for key in events.Tags()["scalars"]}


def read_mlflow(output: Path) -> Scalars:
    """Read the file store: a file for each metric, with lines of time, value and step."""
    (folder,) = output.glob("mlruns/*/*/metrics")
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    rows = {key: [line.split() for line in file.read_text().splitlines()] for key, file in files.items()}
    return {key: {int(step): float(value) for _, value, step in lines} for key, lines in rows.items()}


def read_trackio(output: Path) -> Scalars:
    (file,) = output.glob("trackio/*.db")
    scalars: Scalars = {}
    for (text,) in sqlite3.connect(file).execute("SELECT metrics FROM metrics"):
        metrics = json.loads(text)
        for key, value in metrics.items():
            scalars.setdefault(key, {})[metrics["train/global_step"]] = value
    return scalars


READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "trackio": read_trackio}
# Reporters with files in a format of their own -> these files. They hold keys as plain text.
BINARY_FILES = {"wandb": "wandb/offline-run-*/run-*.wandb", "swanlab": "swanlog/run-*/backup.swanlab"}


@pytest.fixture
def reporting_run(tiny_inputs, tmp_path, monkeypatch, request) -> Path:
    """Train with the reporter that the test is about."""
    name, output = request.node.callspec.params["name"], tmp_path / "out"
    if find_spec(name) is None:
        pytest.skip(f"the package {name} is not installed")
    variables = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": output,
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": (output / "mlruns").as_uri(),
        "SWANLAB_MODE": "offline",
        "SWANLAB_LOG_DIR": output / "swanlog",
        "TRACKIO_DIR": output / "trackio",
    }
    for variable, value in variables.items():
        monkeypatch.setenv(variable, str(value))
    meta = write_evaluation_meta(tiny_inputs, tmp_path)
    flags = ["--eval_meta_path", str(meta), *"--eval_strategy steps --eval_steps 2 --eval_max_new_tokens 2".split()]
    flags += ["--report_to", name, "--run_name", "tiny"]
    # wandb writes its file when Python exits, which a forked rank does not.
    run_training(tiny_inputs, output, *TRAIN_ADAPTERS, *flags, launcher=name == "wandb")
    return output


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", READERS)
def test_reporter_has_the_evaluations(reporting_run, name):
    scalars, evaluations = READERS[name](reporting_run), read_evaluations(reporting_run)
    keys = [key for key in evaluations[2] if key.startswith("eval/")]
    assert {"eval/loss", "eval/held/loss", "eval/held/exact_match", "eval/held/exact_match_low"} <= set(keys)
    for key in keys:
        expected = {step: evaluation[key] for step, evaluation in evaluations.items()}
        assert scalars[key] == pytest.approx(expected, rel=1e-6), key
    losses = dict(enumerate(read_losses(reporting_run), start=1))
    assert scalars["train/loss"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", BINARY_FILES)
def test_reporter_has_the_keys(reporting_run, name):
    (file,) = reporting_run.glob(BINARY_FILES[name])
    content = file.read_bytes()
    for key in ("eval/loss", "eval/held/loss", "eval/held/exact_match", "train/loss"):
        assert key.encode() in content, key
    assert b"eval_loss" not in content
