"""Evaluate a model: losses, answers, scores, and their files.

    EvaluationData -> token losses            token_losses.py
                   -> questions -> answers    answers.py
                   -> scores, intervals       scores.py, statistics.py
                   -> FOLDER/predictions.jsonl, FOLDER/metrics.json          results.py

The trainer and `tools/evaluate.py` call the same `evaluate`.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from internvl.dist_utils import run_on_rank_0
from internvl.evaluation.answers import generate_answers
from internvl.evaluation.evaluation_data import EvaluationData, EvaluationSet
from internvl.evaluation.questions import build_prediction_record
from internvl.evaluation.results import METRIC_PREFIX, write_results
from internvl.evaluation.scores import METRICS, measure
from internvl.evaluation.settings import EvaluationSettings
from internvl.evaluation.statistics import compute_interval
from internvl.evaluation.token_losses import measure_token_losses, summarize_token_losses
from internvl.model.internvl_chat import InternVLChatModel


def evaluate(
    model: InternVLChatModel,
    tokenizer: PreTrainedTokenizerBase,
    data: EvaluationData,
    settings: EvaluationSettings,
    folder: str | Path,
    step: int | None = None,
    model_name: str | None = None,
) -> dict[str, float]:
    """Evaluate a model and write the files of the evaluation.

    A collective: all ranks call it. Parameters, modes of modules, random states and gradients stay as they are.

    Args:
        folder: rank 0 writes the files here.
        step, model_name: for `metrics.json`.

    Returns:
        Metrics by name, without `eval/`; the same on every rank.

    Raises:
        ValueError: more samples than `settings` allow have become unusable since they were measured.
    """
    seconds, start = {}, time.monotonic()
    with preserved_random_states():
        losses = measure_token_losses(model, data, settings)  # (N,)
        seconds["loss"] = round(time.monotonic() - start, 3)
        answers = generate_answers(model, tokenizer, data, settings)
        seconds["answers"] = round(time.monotonic() - start - seconds["loss"], 3)

    def write_metrics() -> dict[str, float]:
        predictions, metrics = build_results(data, losses, answers)
        content = {
            "step": step,
            "model": model_name,
            "metrics": {f"{METRIC_PREFIX}{name}": value for name, value in metrics.items()},
            "sets": {entry.name: describe_set(entry, predictions) for entry in data.sets},
            "settings": describe_settings(settings.max_new_tokens, settings.num_samples),
            "skipped": [sample._asdict() for sample in data.skipped_samples],
            "seconds": seconds,
        }
        write_results(folder, predictions, content)
        return metrics

    return run_on_rank_0(write_metrics)


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):  # and that of the CPU
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def build_results(
    data: EvaluationData, losses: np.ndarray, answers: dict[int, str]
) -> tuple[list[dict], dict[str, float]]:
    """Score the answers, and summarize losses and scores.

    Args:
        losses: (N,) of TOKEN_LOSSES.
        answers: by sample.

    Returns:
        The predictions, set after set, and the metrics.
    """
    predictions, metrics = [], summarize_token_losses(data, losses)
    for position, entry in enumerate(data.sets):
        samples = data.list_samples(position)
        records = [build_prediction(data, entry, sample, losses[sample], answers) for sample in samples]
        metrics |= {f"{entry.name}/{name}": value for name, value in score_predictions(entry, records).items()}
        predictions += records
    return predictions, metrics


def build_prediction(
    data: EvaluationData, entry: EvaluationSet, sample: int, loss: np.void, answers: dict[int, str]
) -> dict:
    """Build the line of a sample in `predictions.jsonl`, without its score."""
    dataset, index = data.dataset.locate(sample)
    tokens = int(loss["tokens"])
    return {
        "set": entry.name,
        "line": dataset.line_number(index),
        "file": dataset.annotations.path,
        **build_prediction_record(dataset, index, entry.metric),
        "prediction": answers.get(sample),
        "metric": entry.metric,
        **({"scorer": entry.scorer} if entry.scorer else {}),
        "score": None,
        "loss": float(loss["loss_sum"]) / tokens if tokens else None,
        "tokens": tokens,
        "correct": int(loss["correct"]),
    }


def score_predictions(entry: EvaluationSet, predictions: list[dict]) -> dict[str, float]:
    """Set the `score` of predictions that are answers, and summarize them.

    Returns:
        Score, ends of its 95 % interval and further numbers of the metric; empty without answers.
    """
    metric = entry.metric
    answered = [prediction for prediction in predictions if prediction["prediction"] is not None]
    if metric is None or not answered:
        return {}
    terms = measure(metric, answered)  # (n, K)
    for prediction, score in zip(answered, terms[:, 0].tolist(), strict=True):
        prediction["score"] = score
    (_, headline), *details = METRICS[metric].summarize_fn(terms.sum(0), len(terms)).items()
    low, high = compute_interval(metric, terms)
    summary = {metric: headline, f"{metric}_low": low, f"{metric}_high": high}
    summary |= {f"{metric}_{name}": value for name, value in details}
    return {name: float(value) for name, value in summary.items()}


def describe_settings(max_new_tokens: int, num_samples: int | None) -> dict:
    """Describe what answers depend on beside model and samples, for `metrics.json`."""
    return {"max_new_tokens": max_new_tokens, "num_samples": num_samples}


def describe_set(entry: EvaluationSet, predictions: list[dict]) -> dict:
    """Describe an evaluation set, for `metrics.json`."""
    own = [prediction for prediction in predictions if prediction["set"] == entry.name]
    return {
        "samples": len(own),
        "answered": sum(prediction["prediction"] is not None for prediction in own),
        "loss_tokens": sum(prediction["tokens"] for prediction in own),
        "metric": entry.metric,
        "scorer": entry.scorer,
        "greater_is_better": METRICS[entry.metric].greater_is_better if entry.metric else None,
        "split": entry.split,
    }
