"""Files of an evaluation: one line per sample, and the metrics of all sets.

    FOLDER/predictions.jsonl    {"set": "docvqa", "line": 17, "file": ..., "images": [...], "question": ...,
                                 "references": [...], "prediction": ..., "metric": "anls", "score": 0.9, "loss": 0.21,
                                 "tokens": 12, "correct": 10}
    FOLDER/metrics.json         {"step": 50, "metrics": {"eval/docvqa/loss": 0.4, ...}, "sets": {"docvqa": {...}}, ...}

JSON has no NaN or infinity: they are written as null. Files that are read may come from elsewhere.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from internvl.constants import shorten
from internvl.regular_files import open_regular_file, read_json_object

EVALUATION_DIR = "evaluation"  # in the output folder of a run
PREDICTIONS_FILE, EVALUATION_METRICS_FILE = "predictions.jsonl", "metrics.json"
METRIC_PREFIX = "eval/"
MAX_PREDICTIONS_BYTES, MAX_LINE_BYTES, MAX_METRICS_BYTES = 2**34, 2**26, 2**26
# Keys that every line of PREDICTIONS_FILE has -> types of their values.
NUMBER = (int, float, type(None))
PREDICTION_KEYS: dict[str, tuple[type, ...]] = {
    "set": (str,),
    "line": (int,),
    "file": (str,),
    "question": (str,),
    "references": (list,),
    "prediction": (str, type(None)),
    "metric": (str, type(None)),
    "score": NUMBER,
    "loss": NUMBER,
    "tokens": (int,),
    "correct": (int,),
}
OPTIONAL_KEYS: dict[str, tuple[type, ...]] = {"images": (list,), "video": (str,), "history": (list,), "scorer": (str,)}
METRICS_KEYS: dict[str, tuple[type, ...]] = {"step": (int, type(None)), "metrics": (dict,), "sets": (dict,)}


def write_results(folder: str | Path, predictions: Iterable[dict], content: dict) -> None:
    """Write the two files of an evaluation.

    Each is complete or missing, whenever the process ends. The metrics are written last: where they are, all is.

    Args:
        content: of `metrics.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EVALUATION_METRICS_FILE).unlink(missing_ok=True)
    write_lines(folder / PREDICTIONS_FILE, map(format_json, predictions))
    write_lines(folder / EVALUATION_METRICS_FILE, [format_json(content, indent=2)])


def write_lines(file: Path, lines: Iterable[str]) -> None:
    """Write a file under another name first, so that it is never incomplete."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as opened:
        opened.writelines(f"{line}\n" for line in lines)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(unfinished, file)


def format_json(value: Any, indent: int | None = None) -> str:
    """Format a value as JSON; NaN and infinity become null."""
    return json.dumps(_replace_non_finite(value), indent=indent, allow_nan=False)


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- printing ----------------------------------------------------------------------------------------------------------


def format_metrics(content: dict) -> str:
    """Format the metrics of the sets as a table.

    Args:
        content: of `metrics.json`.
    """
    metrics = {name.removeprefix(METRIC_PREFIX): value for name, value in content["metrics"].items()}
    rows = [["set", "samples", "loss", "perplexity", "token accuracy", "metric", "score", "95 % interval"]]
    for name, entry in content["sets"].items():
        rows.append([name, f"{entry['samples']:,}", *_format_losses(metrics, f"{name}/")])
        metric = entry["metric"]
        if metric and f"{name}/{metric}" in metrics:
            score, low, high = (metrics[f"{name}/{metric}{end}"] for end in ("", "_low", "_high"))
            rows[-1] += [metric, f"{score:.4f}", f"{low:.4f} to {high:.4f}"]
    if "loss" in metrics and len(content["sets"]) > 1:
        rows.append(["all", "", *_format_losses(metrics, "")])
    table = format_table(rows)
    return table if "forgetting" not in metrics else f"{table}\nforgetting: {metrics['forgetting']:.4f}"


def _format_losses(metrics: dict[str, float], prefix: str) -> list[str]:
    names = ("loss", "perplexity", "token_accuracy")
    return [f"{metrics[prefix + name]:.4f}" if prefix + name in metrics else "-" for name in names]


def format_table(rows: list[list[str]]) -> str:
    """Align the columns of a table: text of the first one to the left, all others to the right."""
    width = max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_predictions(folder: str | Path) -> list[dict]:
    """Read the lines of `predictions.jsonl`.

    Raises:
        ValueError, OSError: the file is missing, damaged, or no file of predictions; the message names the line.
    """
    file, predictions = Path(folder) / PREDICTIONS_FILE, []
    with open_regular_file(file, MAX_PREDICTIONS_BYTES) as opened:
        while line := opened.readline(MAX_LINE_BYTES + 1):
            source = f"{file} line {len(predictions) + 1}"
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{source} is invalid: it has more than {MAX_LINE_BYTES:,} bytes.")
            try:
                prediction = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{source} is not JSON: {str(error):.200}.") from error
            _check_keys(prediction, PREDICTION_KEYS, source)
            _check_keys(
                prediction, {key: OPTIONAL_KEYS[key] for key in OPTIONAL_KEYS.keys() & prediction.keys()}, source
            )
            predictions.append(prediction)
    if not predictions:
        raise ValueError(f"{file} is invalid: it has no lines.")
    return predictions


def read_metrics(folder: str | Path) -> dict:
    """Read `metrics.json`; a metric that was not finite is NaN.

    Raises:
        ValueError, OSError: the file is missing, damaged, or no file of metrics.
    """
    file = Path(folder) / EVALUATION_METRICS_FILE
    content = read_json_object(file, MAX_METRICS_BYTES)
    _check_keys(content, METRICS_KEYS, str(file))
    _check_keys(content["metrics"], dict.fromkeys(content["metrics"], NUMBER), f"metrics of {file}")
    _check_keys(content["sets"], dict.fromkeys(content["sets"], (dict,)), f"sets of {file}")
    content["metrics"] = {name: math.nan if value is None else value for name, value in content["metrics"].items()}
    return content


def _check_keys(value: Any, keys: dict[str, tuple[type, ...]], source: str) -> None:
    """Raise a ValueError if `value` is no object with these keys and types."""
    if not isinstance(value, dict):
        raise ValueError(f"{source} is invalid: expected an object, got {shorten(value)}.")
    for key, types in keys.items():
        if key not in value or type(value[key]) not in types:
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            found = shorten(value[key]) if key in value else "nothing"
            raise ValueError(f"{source} is invalid: {shorten(key)} must be {expected}, got {found}.")
