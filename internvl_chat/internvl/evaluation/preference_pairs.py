"""Evaluation of preference pairs: loss, rewards and their accuracy, by set.

The pairs are measured by the trainer, which has the reference model: `train/trainer_dpo.py`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from internvl.data.preference_dataset import SIDES
from internvl.data.schema import get_media
from internvl.evaluation.evaluation_data import EvaluationData
from internvl.evaluation.results import METRIC_PREFIX, write_results
from internvl.evaluation.settings import EvaluationSettings
from internvl.planning.epoch_plan import EpochPlan, PlanLayout, plan_epoch


def make_pair_dtype(metric_names: Sequence[str]) -> np.dtype:
    """Make the type of a pair's result: loss tokens of both answers, loss, metrics."""
    return np.dtype([("tokens", np.int64), ("loss", np.float64), *((name, np.float64) for name in metric_names)])


def plan_pairs(lengths: np.ndarray, settings: EvaluationSettings, world_size: int) -> EpochPlan:
    """Plan batches of pairs of similar length, `batch_size` on each rank; the same in every evaluation."""
    layout = PlanLayout(
        seed=0,
        world_size=world_size,
        micro_batch_size=settings.batch_size,
        gradient_accumulation=1,
        group_by_length=True,
    )
    return plan_epoch(lengths, layout, epoch=0)


def summarize_pairs(data: EvaluationData, pairs: np.ndarray) -> dict[str, float]:
    """Compute the mean of loss and metrics over the pairs of each set, and over all.

    Args:
        pairs: (N,) of `make_pair_dtype`.

    Returns:
        `NAME/loss`, `NAME/rewards/accuracies`, ..., and the same without NAME for all pairs. A set without pairs is
        left out.
    """
    metrics = {}
    for entry, part in zip(data.sets, np.split(pairs, data.dataset.ends[:-1]), strict=True):
        metrics |= {f"{entry.name}/{name}": value for name, value in compute_means(part).items()}
    return metrics | compute_means(pairs)


def compute_means(pairs: np.ndarray) -> dict[str, float]:
    """Compute the means over the pairs that were measured; nothing without any."""
    measured = pairs[pairs["tokens"] > 0]
    return {name: float(measured[name].mean()) for name in list_metrics(measured)} if len(measured) else {}


def list_metrics(pairs: np.ndarray) -> list[str]:
    """List the metrics of `make_pair_dtype`, the loss among them."""
    return [name for name in pairs.dtype.names or () if name != "tokens"]


def write_pair_results(
    data: EvaluationData, pairs: np.ndarray, metrics: dict[str, float], folder: str | Path, **content
) -> None:
    """Write the files of an evaluation, as for other samples.

    Args:
        content: further entries of `metrics.json`.
    """
    sets = {}
    for entry, part in zip(data.sets, np.split(pairs, data.dataset.ends[:-1]), strict=True):
        counts = {"samples": int(np.count_nonzero(part["tokens"])), "loss_tokens": int(part["tokens"].sum())}
        no_answers = {"answered": 0, "metric": None, "scorer": None, "greater_is_better": None}
        sets[entry.name] = {**counts, **no_answers, "split": entry.split}
    prefixed = {f"{METRIC_PREFIX}{name}": value for name, value in metrics.items()}
    skipped = [sample._asdict() for sample in data.skipped_samples]
    content |= {"metrics": prefixed, "sets": sets, "skipped": skipped}
    write_results(folder, describe_pairs(data, pairs), content)


def describe_pairs(data: EvaluationData, pairs: np.ndarray) -> Iterator[dict]:
    """Yield the lines of `predictions.jsonl`: the texts and the numbers of each pair."""
    for position, entry in enumerate(data.sets):
        for sample in data.list_samples(position):
            dataset, index = data.dataset.locate(sample)
            record, paths, pair = dataset.read_record(index), dataset.list_media_paths(index), pairs[sample]
            values = {name: float(pair[name]) if pair["tokens"] else None for name in list_metrics(pairs)}
            yield {
                "set": entry.name,
                "line": dataset.line_number(index),
                "file": dataset.annotations.path,
                **({"video": paths[0]} if get_media(record)[0] == "video" else {"images": paths}),
                **{key: record[key] for key in ("question", *SIDES)},
                "references": [],
                "prediction": None,
                "metric": None,
                "score": None,
                "correct": 0,
                "tokens": int(pair["tokens"]),
                **values,
            }
