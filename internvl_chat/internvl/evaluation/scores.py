"""Metrics of generated answers: a score per record, and numbers over all records.

A record is a dict with `prediction` (a text, may be empty), `references` (texts; for box_iou boxes), and what its
metric requires (`Metric.required_keys`). Scores are fractions, except those of bleu (0 to 100) and cider (raw: 1.0 is
printed as 100 in papers). Of several references the best counts, unless a metric says otherwise.

    records -> terms (N, K): numbers that add up over records; column 0 holds the scores
            -> sums (K,)     -> headline number and details

`statistics.py` resamples the terms: an interval of a corpus metric needs no second scoring.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from internvl.constants import shorten
from internvl.evaluation.metrics.box_scores import find_box_error, measure_boxes, summarize_boxes
from internvl.evaluation.metrics.caption_scores import measure_cider
from internvl.evaluation.metrics.choice_scores import find_choice_error, score_multiple_choice
from internvl.evaluation.metrics.library_scores import (
    measure_bleu,
    measure_cer,
    measure_rouge_l,
    measure_wer,
    summarize_bleu,
    summarize_error_rates,
)
from internvl.evaluation.metrics.number_scores import (
    find_count_error,
    find_number_error,
    find_number_type_error,
    score_counting,
    score_number,
    score_relaxed_accuracy,
)
from internvl.evaluation.metrics.text_scores import score_anls, score_exact_match, score_token_f1
from internvl.evaluation.metrics.vqa_scores import score_vqa_accuracy
from internvl.evaluation.metrics.yes_no_scores import (
    find_yes_no_error,
    measure_yes_no,
    read_yes_no_like_internvl,
    summarize_yes_no,
)
from internvl.versions import require_package

INTERNVL_SCORER = "internvl"

MeasureFn = Callable[[list[dict]], np.ndarray]


def per_record(score_fn: Callable[[dict], float]) -> MeasureFn:
    """Make a function that measures records one by one."""
    return lambda records: np.array([[score_fn(record)] for record in records], dtype=np.float64)


def average(sums: np.ndarray, num_records: int) -> dict[str, np.ndarray]:
    """Compute the mean of the scores."""
    return {"mean": sums[..., 0] / num_records}


def find_text_error(record: dict) -> str | None:
    """Return what is wrong with references that must be texts."""
    wrong = [reference for reference in record["references"] if not isinstance(reference, str)]
    return f"reference {shorten(wrong[0])} is not a text" if wrong else None


class Metric(NamedTuple):
    """How a metric scores records.

    Attributes:
        measure_fn: records -> terms (N, K) in float64; column 0 holds the scores.
        summarize_fn: sums of terms (..., K) and number of records -> values (...) by name. The first is the headline.
        internvl_measure_fn: the same with the reading of InternVL's evaluation, where it differs.
        find_error_fn: what is wrong with a record without its prediction, in a few words; None: nothing.
        find_type_error_fn: the part of it that cannot be scored, where the rest has a score (0: no answer matches).
        required_keys: of a record, beside `prediction` and `references`.
        is_binary: whether every score is 0 or 1.
        library: package that computes it, imported on use.
        detail_names: of the values of `summarize_fn` beside the headline.
    """

    measure_fn: MeasureFn
    summarize_fn: Callable[[np.ndarray, int], dict[str, np.ndarray]] = average
    internvl_measure_fn: MeasureFn | None = None
    find_error_fn: Callable[[dict], str | None] = find_text_error
    find_type_error_fn: Callable[[dict], str | None] | None = None
    required_keys: tuple[str, ...] = ()
    is_binary: bool = False
    greater_is_better: bool = True
    library: str | None = None
    detail_names: tuple[str, ...] = ()


METRICS = {
    "exact_match": Metric(per_record(score_exact_match), is_binary=True),
    "vqa_accuracy": Metric(per_record(score_vqa_accuracy)),
    "anls": Metric(per_record(score_anls)),
    "relaxed_accuracy": Metric(
        per_record(score_relaxed_accuracy),
        internvl_measure_fn=per_record(partial(score_relaxed_accuracy, relative_to="prediction")),
        is_binary=True,
    ),
    "token_f1": Metric(per_record(score_token_f1)),
    "multiple_choice": Metric(
        per_record(score_multiple_choice), find_error_fn=find_choice_error, required_keys=("choices",), is_binary=True
    ),
    "yes_no": Metric(
        measure_yes_no,
        summarize_yes_no,
        internvl_measure_fn=partial(measure_yes_no, read_fn=read_yes_no_like_internvl),
        find_error_fn=find_yes_no_error,
        is_binary=True,
        detail_names=("precision", "recall", "f1", "yes_ratio"),
    ),
    "box_iou": Metric(
        measure_boxes,
        summarize_boxes,
        find_error_fn=find_box_error,
        required_keys=("width", "height"),
        is_binary=True,
        detail_names=("mean_iou",),
    ),
    "counting": Metric(
        per_record(score_counting), find_error_fn=find_count_error, find_type_error_fn=find_text_error, is_binary=True
    ),
    "number": Metric(
        per_record(score_number),
        find_error_fn=find_number_error,
        find_type_error_fn=find_number_type_error,
        required_keys=("answer_type",),
        is_binary=True,
    ),
    "cider": Metric(measure_cider),
    "bleu": Metric(measure_bleu, summarize_bleu, library="sacrebleu", detail_names=("brevity_penalty",)),
    "rouge_l": Metric(measure_rouge_l, library="rouge-score"),
    "cer": Metric(measure_cer, summarize_error_rates, greater_is_better=False, library="jiwer", detail_names=("mean",)),
    "wer": Metric(measure_wer, summarize_error_rates, greater_is_better=False, library="jiwer", detail_names=("mean",)),
}


def score(metric: str, record: dict, scorer: str | None = None) -> float:
    """Score one prediction.

    The `cider` of one record is 0: its weights come from the other records. See `score_all`.

    Args:
        scorer: "internvl" for the reading of InternVL's evaluation. None: what the record says under this key.

    Raises:
        ValueError: the record has no references or lacks what its metric requires, its prediction or another value is
            invalid, or a library is missing.
    """
    if not record.get("references"):
        raise ValueError(f"{describe_record(record)} cannot be scored: it has no references.")
    return float(measure(metric, [record], scorer)[0, 0])


def score_all(metric: str, records: list[dict], scorer: str | None = None) -> list[float | None]:
    """Score predictions that belong together; None where a record has no references."""
    scores = iter(measure(metric, records, scorer)[:, 0].tolist())
    return [next(scores) if record.get("references") else None for record in records]


def aggregate(metric: str, records: list[dict], scorer: str | None = None) -> float:
    """Compute the headline number over records.

    That is the mean of the scores; for `cer` and `wer` all edits divided by all reference lengths; for `bleu` that of
    the corpus. Records without references are left out.

    Raises:
        ValueError: no record has references; see also `score`.
    """
    return next(iter(summarize(metric, records, scorer).values()))


def compute_details(metric: str, records: list[dict], scorer: str | None = None) -> dict[str, float]:
    """Compute the further numbers over records, such as the f1 of yes_no."""
    return dict(list(summarize(metric, records, scorer).items())[1:])


def summarize(metric: str, records: list[dict], scorer: str | None = None) -> dict[str, float]:
    """Compute the headline number and the further numbers over records."""
    terms = measure(metric, records, scorer)
    if not len(terms):
        raise ValueError(f"{metric} cannot be computed: none of {len(records)} records has references.")
    return {name: float(value) for name, value in get_metric(metric).summarize_fn(terms.sum(0), len(terms)).items()}


def measure(metric: str, records: list[dict], scorer: str | None = None) -> np.ndarray:
    """Return the terms (N, K) of the records that have references.

    Args:
        scorer: see `score`.

    Raises:
        ValueError: see `score`.
    """
    entry = get_metric(metric)
    scorable = [record for record in records if record.get("references")]
    for record in scorable:
        if error := find_prediction_error(entry, record):
            raise ValueError(f"{describe_record(record)} cannot be scored by {metric}: {error}.")
    if not scorable:
        return np.zeros((0, 1))
    if scorer not in (None, INTERNVL_SCORER):
        raise ValueError(f"scorer {scorer!r:.80} is invalid: expected {INTERNVL_SCORER!r} or None.")
    require_library(metric)
    if entry.internvl_measure_fn is None:
        return entry.measure_fn(scorable)
    # Metrics with two readings score records one by one.
    measure_fns = {True: entry.internvl_measure_fn, False: entry.measure_fn}
    is_internvl = [(scorer or record.get("scorer")) == INTERNVL_SCORER for record in scorable]
    return np.concatenate([measure_fns[key]([record]) for key, record in zip(is_internvl, scorable, strict=True)])


def find_prediction_error(entry: Metric, record: dict) -> str | None:
    """Return why a record with a prediction cannot be scored, in a few words; None: it can be."""
    missing = [key for key in ("prediction", *entry.required_keys) if record.get(key) is None]
    if missing:
        return f"it lacks {missing[0]!r}"
    prediction, references = record["prediction"], record["references"]
    if not isinstance(prediction, str):
        return f"prediction {shorten(prediction)} is not a text"
    if not isinstance(references, list):
        return f"expected a list of references, got {shorten(references)}"
    return (entry.find_type_error_fn or entry.find_error_fn)(record)


def require_library(metric: str) -> None:
    """Check that the package of a metric is installed.

    Raises:
        ValueError: it is not.
    """
    if library := get_metric(metric).library:
        require_package(library, f"metric {metric}")


def get_metric(metric: str) -> Metric:
    """Return the entry of a metric.

    Raises:
        ValueError: unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r:.80} is unknown: expected one of {', '.join(METRICS)}.")
    return METRICS[metric]


def find_record_error(metric: str, record: dict) -> str | None:
    """Return why a record can never be scored right, before there is a prediction.

    Args:
        record: `references` and what else the metric requires.

    Returns:
        A few words for a message, such as "lacks 'choices'"; None: nothing is wrong.
    """
    entry = get_metric(metric)
    references = record.get("references")
    if not isinstance(references, list) or not references:
        return f"expected a list of at least one reference, got {shorten(references)}"
    missing = [key for key in entry.required_keys if record.get(key) is None]
    return f"lacks {missing[0]!r}" if missing else entry.find_error_fn(record)


def describe_record(record: dict) -> str:
    """Name a record in a message: by its id, by file and line, or by its content."""
    if "id" in record:
        return f"Record {shorten(record['id'])}"
    if "line" in record:
        return f"Record {record.get('file', record.get('set', ''))}, line {record['line']}"
    return f"Record {shorten(record)}"
