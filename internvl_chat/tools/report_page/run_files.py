"""Read the files of a run for its report.

They may be half-written, damaged, missing, or of an earlier run in the same folder. Everything in them is untrusted.
What cannot be read is listed in `Run.problems` and left out.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from internvl.arguments.evaluation_strategy import LOG_PREFIX
from internvl.checkpoint.manifest import list_checkpoints
from internvl.checkpoint.resume_rules import FLAGS_FILE, RUN_FILE
from internvl.checkpoint.trainer_state import MAX_TRAINER_STATE_BYTES, TRAINER_STATE_FILE
from internvl.data.skipped_samples import SKIPPED_SAMPLES_FILE
from internvl.evaluation.results import (
    EVALUATION_DIR,
    EVALUATION_METRICS_FILE,
    METRIC_PREFIX,
    PREDICTIONS_FILE,
    read_metrics,
)
from internvl.metrics.step_metrics import METRICS_FILE
from internvl.regular_files import open_regular_file, read_json_object
from internvl.runtime.output_lock import is_lock_held

MAX_LINE_BYTES = 2**20
MAX_NUMBER = 1e100  # larger values are drawn as not finite
SETTING_TYPES = {"flags": dict, "datasets": dict, "versions": dict, "changes": list}  # keys of `Run.settings`
# Keys that transformers adds to an evaluation.
TIMING_KEYS = {"runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "model_preparation_time"}


@dataclass
class Run:
    """What the files of a run say.

    Attributes:
        state: "running", "finished" or "stopped".
        step, max_steps: `max_steps` is 0 if it is unknown.
        training: log entries by step, of numbers only.
        evaluations: metrics without prefix by step, of numbers only.
        sets: evaluation set -> its entry in `metrics.json`.
        prediction_dirs: folders with predictions by step.
        settings: content of `run.json` or `flags.json`; the keys of SETTING_TYPES exist.
        trainer_state: of the output folder, else of the newest checkpoint; empty if there is none.
        checkpoints: their steps, ascending.
        model_dir: folder of the newest weights; None if there are none yet.
        skipped_samples: a sentence for each unusable sample.
        problems: a sentence for each file that cannot be read.
    """

    folder: Path
    state: str = "stopped"
    step: int = 0
    max_steps: int = 0
    training: dict[int, dict[str, float]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    sets: dict[str, dict] = field(default_factory=dict)
    prediction_dirs: dict[int, Path] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    trainer_state: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    model_dir: Path | None = None
    skipped_samples: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def read_object(self, file: Path, **limits: int) -> dict[str, Any]:
        """Read a JSON object; empty if it does not exist or is damaged."""
        try:
            return read_json_object(file, **limits)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.add_problem(file, error)
            return {}

    def add_problem(self, file: Path, error: object) -> None:
        """Record why a file is left out."""
        name = file.relative_to(self.folder) if file.is_relative_to(self.folder) else file
        reason = str(error).replace(f"{file} ", "").removesuffix(".")
        self.problems.append(f"{name} is left out: {reason:.300}")


def read_run(folder: Path) -> Run:
    """Read all files of a run but its predictions.

    Raises:
        ValueError: the folder does not exist or holds no run.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected the --output_dir of a run.")
    run = Run(folder)
    run.settings = run.read_object(folder / RUN_FILE)
    read_metrics_file(run)
    checkpoints = list_checkpoints(folder)  # newest first
    read_state(run, checkpoints)
    read_evaluations(run)
    read_settings(run, checkpoints)
    run.skipped_samples = read_skipped_samples(run)
    if not (run.training or run.evaluations or run.settings["flags"] or run.problems):
        raise ValueError(
            f"{folder} holds no run: it has no {METRICS_FILE}, {TRAINER_STATE_FILE}, {FLAGS_FILE} or {EVALUATION_DIR}/."
        )
    return run


def is_step(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**53


def parse_number(value: Any) -> float:
    """Return a number of a file as float: NaN for null and infinity for a number that no run has."""
    if value is None:
        return math.nan
    return math.inf if abs(value) > MAX_NUMBER else float(value)


def keep_numbers(entry: dict[str, Any]) -> dict[str, float]:
    """Keep the values that are numbers or null."""
    return {key: parse_number(value) for key, value in entry.items() if value is None or type(value) in (int, float)}


# -- curves ------------------------------------------------------------------------------------------------------------


def read_lines(run: Run, file: Path) -> Iterator[dict]:
    """Read the objects of a JSON Lines file; an incomplete last line is not an error."""
    num_damaged = 0
    try:
        with open_regular_file(file) as opened:
            while line := opened.readline(MAX_LINE_BYTES):
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    entry = None
                if isinstance(entry, dict):
                    yield entry
                else:
                    num_damaged += line.endswith(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        run.add_problem(file, error)
    if num_damaged:
        run.problems.append(f"{file.name}: {num_damaged} damaged lines are left out")


def read_metrics_file(run: Run) -> None:
    """Read the log entries of training and evaluation from `metrics.jsonl`."""
    for entry in read_lines(run, run.folder / METRICS_FILE):
        step = entry.pop("step", None)
        if is_step(step):
            add_log_entry(run, step, keep_numbers(entry), METRIC_PREFIX)
    run.training = dict(sorted(run.training.items()))


def add_log_entry(run: Run, step: int, entry: dict[str, float], prefix: str) -> None:
    """Add a log entry of training or evaluation.

    Args:
        prefix: of the keys of an evaluation.
    """
    metrics = {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}
    metrics = {key: value for key, value in metrics.items() if key not in TIMING_KEYS}
    if metrics:
        run.evaluations.setdefault(step, {}).update(metrics)
    if "loss" in entry:
        run.training.setdefault(step, {}).update(entry)


def read_evaluations(run: Run) -> None:
    """Read the folders of evaluations; metrics that `metrics.jsonl` lacks are added.

    The run's folder itself may be one, as `tools/evaluate.py` writes it.
    """
    folders = {0: run.folder}
    for path in run.folder.glob(f"{EVALUATION_DIR}/step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and len(number) < 16:
            folders[int(number)] = path
    for step, path in sorted(folders.items()):
        if run.step and step > run.step:  # of an earlier run in this folder
            continue
        try:
            content = read_metrics(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            run.add_problem(path / EVALUATION_METRICS_FILE, error)
            continue
        metrics = {key.removeprefix(METRIC_PREFIX): value for key, value in keep_numbers(content["metrics"]).items()}
        run.evaluations[step] = metrics | run.evaluations.get(step, {})
        run.sets |= content["sets"]
        if (path / PREDICTIONS_FILE).exists():
            run.prediction_dirs[step] = path
    run.evaluations = dict(sorted(run.evaluations.items()))
    if run.evaluations and not run.training and run.state == "stopped":  # a checkpoint was evaluated
        run.state = "finished"


# -- state and settings ------------------------------------------------------------------------------------------------


def read_state(run: Run, checkpoints: list[Path]) -> None:
    """Find out how far the run is."""
    run.checkpoints = sorted(int(path.name.removeprefix("checkpoint-")) for path in checkpoints)
    is_running = is_lock_held(run.folder)
    for folder in [run.folder, *checkpoints]:
        state = run.read_object(folder / TRAINER_STATE_FILE, max_bytes=MAX_TRAINER_STATE_BYTES)
        if is_step(state.get("global_step")) and belongs_to_run(state, run.training):
            run.trainer_state = state
            run.state = "finished" if folder == run.folder and not is_running else run.state
            break
    if is_running:
        run.state = "running"
    if not run.training:
        read_log_history(run)
    run.step = max([run.trainer_state.get("global_step", 0), *run.training, *run.evaluations])
    max_steps = run.settings.get("max_steps", run.trainer_state.get("max_steps"))
    run.max_steps = max(max_steps, run.step) if is_step(max_steps) else 0


def belongs_to_run(state: dict[str, Any], training: dict[int, dict[str, float]]) -> bool:
    """Check whether a trainer state is of the run that wrote the log, by its last loss."""
    history = state.get("log_history")
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    last = next((entry for entry in reversed(entries) if "loss" in entry), None)
    if last is None or not training:
        return True
    step = last.get("step")
    found = training.get(step, {}).get("loss") if isinstance(step, int) else None
    return found is not None and (found == last["loss"] or math.isnan(found))


def read_log_history(run: Run) -> None:
    """Read the log entries from the trainer state, where there is no `metrics.jsonl`."""
    history = run.trainer_state.get("log_history")
    for entry in history if isinstance(history, list) else []:
        step = entry.get("step") if isinstance(entry, dict) else None
        if is_step(step):
            add_log_entry(run, step, keep_numbers(entry), LOG_PREFIX)


def read_settings(run: Run, checkpoints: list[Path]) -> None:
    """Complete the settings: without `run.json`, those of the newest weights."""
    folders = [run.folder, *checkpoints] if run.state == "finished" else [*checkpoints, run.folder]
    run.model_dir = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if not run.settings and run.model_dir:
        run.settings = run.read_object(run.model_dir / FLAGS_FILE)
    for key, kind in SETTING_TYPES.items():
        if not isinstance(run.settings.get(key), kind):
            run.settings[key] = kind()


def read_skipped_samples(run: Run) -> list[str]:
    """Read the unusable samples that training has skipped, without repetitions."""
    entries = read_lines(run, run.folder / SKIPPED_SAMPLES_FILE)
    return list(dict.fromkeys(str(entry.get("sample")) for entry in entries))
