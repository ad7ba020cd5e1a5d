"""Compare two evaluations of the same samples.

A sample is recognized by its set and line, and must have the same question, history, references and names of images:
files may have moved. Scores and losses are compared in pairs, so that what makes a sample hard for both models does not
hide a difference.

    OUTPUT/comparison.json    {"names": [...], "sets": [{"name": "docvqa", "score": {"difference": 0.04, ...}, ...}]}
    OUTPUT/changed.jsonl      lines of `predictions.jsonl` whose answer differs, with `other_prediction`, `other_score`
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from internvl.constants import escape_control_characters, shorten
from internvl.evaluation.results import format_json, format_table, read_metrics, read_predictions, write_lines
from internvl.evaluation.scores import find_record_error, get_metric, measure
from internvl.evaluation.statistics import PairedDifference, bootstrap_difference, compare_models, get_headline_fn

COMPARISON_FILE, CHANGES_FILE = "comparison.json", "changed.jsonl"
NUM_SHOWN = 5  # changed samples that are printed
MAX_SHOWN_CHARACTERS = 60  # of a question or an answer
# Keys of a prediction that depend on the model or on where the files are. All others belong to the sample.
OTHER_KEYS = {"file", "images", "video", "prediction", "score", "loss", "tokens", "correct"}
SampleKey = tuple[str, int]  # set and line
Pair = tuple[dict, dict]  # predictions of both evaluations


class ComparedNumber(NamedTuple):
    """A number of two evaluations, and their difference: value - other."""

    value: float
    other: float
    paired: PairedDifference


@dataclass
class SetComparison:
    """The comparison of an evaluation set.

    Attributes:
        num_samples: that both evaluations have.
        num_only_one: samples that one of them has skipped.
        num_answers: samples with a score in both.
        num_better, num_worse: answers with a better or worse score than in the other evaluation.
        score, loss: None if there is nothing to compare. The loss is over samples with equally many loss tokens.
    """

    name: str
    num_samples: int
    num_only_one: int
    metric: str | None
    num_answers: int
    num_better: int
    num_worse: int
    score: ComparedNumber | None
    loss: ComparedNumber | None


class Comparison(NamedTuple):
    """The comparison of all sets, and the samples whose answers differ."""

    sets: list[SetComparison]
    changed: list[dict]


def compare_results(folder: str | Path, other: str | Path) -> Comparison:
    """Compare two folders of results.

    Raises:
        ValueError, OSError: a file is damaged or missing, the settings of the answers differ, or the evaluations are
            not about the same samples.
    """
    contents = [read_metrics(path) for path in (folder, other)]
    require_equal_settings(contents[0].get("settings"), contents[1].get("settings"), other)
    skipped = [_read_skipped(content) for content in contents]
    return compare_predictions(read_predictions(folder), read_predictions(other), *skipped)


def require_equal_settings(settings: Any, other_settings: Any, other: str | Path) -> None:
    """Raise a ValueError if the answers of the results in `other` have other settings."""
    if settings != other_settings:
        raise ValueError(
            f"the answers in {other} have other settings: expected {shorten(settings)}, got {shorten(other_settings)}. "
            "Evaluate both models with the same flags."
        )


def _read_skipped(content: dict) -> set[SampleKey]:
    entries = content.get("skipped")
    pairs = [(entry.get("dataset"), entry.get("line")) for entry in entries or () if isinstance(entry, dict)]
    return {(name, line) for name, line in pairs if isinstance(name, str) and isinstance(line, int)}


def compare_predictions(
    predictions: list[dict],
    others: list[dict],
    skipped: Collection[SampleKey] = (),
    skipped_by_other: Collection[SampleKey] = (),
) -> Comparison:
    """Compare two evaluations of the same samples.

    Args:
        predictions, others: of `predictions.jsonl`.
        skipped, skipped_by_other: samples that an evaluation has skipped as unusable.

    Raises:
        ValueError: the evaluations are not about the same samples.
    """
    by_key, others_by_key = _index_samples(predictions), _index_samples(others)
    _require_all(by_key, others_by_key, skipped_by_other, "first")
    _require_all(others_by_key, by_key, skipped, "second")
    pairs = [(by_key[key], others_by_key[key]) for key in by_key if key in others_by_key]
    for pair in pairs:
        _require_same_sample(*pair)
    of_one = [name for name, _ in by_key.keys() ^ others_by_key.keys()]
    pairs_by_set = defaultdict(list)
    for pair in pairs:
        pairs_by_set[pair[0]["set"]].append(pair)
    sets = [_compare_set(name, pairs_of_set, of_one.count(name)) for name, pairs_of_set in pairs_by_set.items()]
    return Comparison(sets, [describe_change(*pair) for pair in pairs if has_changed(*pair)])


def has_changed(prediction: dict, other: dict) -> bool:
    """Return whether the answers differ."""
    return prediction["prediction"] != other["prediction"]


def describe_change(prediction: dict, other: dict) -> dict:
    """Add the results of the other evaluation to a prediction."""
    return prediction | {f"other_{key}": other[key] for key in ("prediction", "score", "loss")}


# -- same samples ------------------------------------------------------------------------------------------------------


def _index_samples(predictions: Iterable[dict]) -> dict[SampleKey, dict]:
    by_key: dict[SampleKey, dict] = {}
    for prediction in predictions:
        key = prediction["set"], prediction["line"]
        if key in by_key:
            raise ValueError(f"the predictions of an evaluation have set {key[0]} line {key[1]} twice.")
        by_key[key] = prediction
    return by_key


def _require_all(present: dict, absent: dict, skipped: Collection[SampleKey], which: str) -> None:
    if lacking := sorted(present.keys() - absent.keys() - set(skipped)):
        raise ValueError(
            f"the evaluations are not about the same samples: {len(lacking)} are only in the {which} one, such as set "
            f"{lacking[0][0]} line {lacking[0][1]}. Evaluate both models on the same META."
        )


def _require_same_sample(prediction: dict, other: dict) -> None:
    content, other_content = map(_extract_content, (prediction, other))
    for key in sorted({*content, *other_content}):
        values = content.get(key), other_content.get(key)
        if values[0] != values[1]:
            raise ValueError(
                f"the evaluations are not about the same samples: {key} of set {prediction['set']} line "
                f"{prediction['line']} is {shorten(values[0])} in the first one, and {shorten(values[1])} in the "
                "second. Evaluate both models on the same META."
            )


def _extract_content(prediction: dict) -> dict:
    """Extract what belongs to the sample, with the names of its images."""
    content = {key: value for key, value in prediction.items() if key not in OTHER_KEYS}
    paths = prediction.get("images") or [prediction.get("video")]
    return content | {"images": [PurePath(str(path)).name for path in paths if path]}


# -- differences -------------------------------------------------------------------------------------------------------


def _compare_set(name: str, pairs: list[Pair], num_only_one: int) -> SetComparison:
    metric, num_better, num_worse, score = pairs[0][0]["metric"], 0, 0, None
    scored = [pair for pair in pairs if metric and all(_is_scored(prediction, metric) for prediction in pair)]
    if scored:
        terms, other_terms = (measure(metric, list(side)) for side in zip(*scored, strict=True))  # (n, K)
        value, other = (float(get_headline_fn(metric)(side.sum(0), len(side))) for side in (terms, other_terms))
        score = ComparedNumber(value, other, compare_models(metric, terms, other_terms))
        gains = (terms - other_terms)[:, 0] * (1 if get_metric(metric).greater_is_better else -1)
        num_better, num_worse = int((gains > 0).sum()), int((gains < 0).sum())
    return SetComparison(
        name=name,
        num_samples=len(pairs),
        num_only_one=num_only_one,
        metric=metric,
        num_answers=len(scored),
        num_better=num_better,
        num_worse=num_worse,
        score=score,
        loss=_compare_losses(pairs),
    )


def _is_scored(prediction: dict, metric: str) -> bool:
    has_answer = prediction["prediction"] is not None and prediction["score"] is not None
    return has_answer and find_record_error(metric, prediction) is None


def _compare_losses(pairs: list[Pair]) -> ComparedNumber | None:
    """Compare the mean loss of a token, over samples with the same number of loss tokens."""
    measured = [
        pair
        for pair in pairs
        if all(prediction["loss"] is not None for prediction in pair) and 0 < pair[0]["tokens"] == pair[1]["tokens"]
    ]
    if not measured:
        return None
    terms, other_terms = (
        np.array([(line["loss"] * line["tokens"], line["tokens"]) for line in side])
        for side in zip(*measured, strict=True)
    )  # (n, 2)
    value, other = (float(_average(side.sum(0))) for side in (terms, other_terms))
    return ComparedNumber(value, other, bootstrap_difference(terms, other_terms, _average))


def _average(sums: np.ndarray, num_records: int = 0) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


# -- output ------------------------------------------------------------------------------------------------------------


def write_comparison(output: Path, comparison: Comparison, names: tuple[str, str]) -> None:
    """Write `comparison.json` and `changed.jsonl`.

    Args:
        names: of the two models.
    """
    sets = [_describe_set(entry) for entry in comparison.sets]
    write_lines(output / CHANGES_FILE, map(format_json, comparison.changed))
    write_lines(output / COMPARISON_FILE, [format_json({"names": names, "sets": sets}, indent=2)])


def _describe_set(entry: SetComparison) -> dict:
    numbers = {"score": entry.score, "loss": entry.loss}
    described = {
        name: None if number is None else {"value": number.value, "other": number.other, **number.paired._asdict()}
        for name, number in numbers.items()
    }
    return asdict(entry) | described


def format_comparison(comparison: Comparison, names: tuple[str, str]) -> str:
    """Format a comparison as a table of differences and the first changed samples."""
    rows = [
        ["set", "samples", "number", "first", "second", "difference", "95 % interval", "p", "test", "better", "worse"]
    ]
    for entry in comparison.sets:
        label = [entry.name, f"{entry.num_samples:,}"]
        if entry.score:
            counts = [str(entry.num_better), str(entry.num_worse)]
            rows.append([*label, str(entry.metric), *_format_number(entry.score), *counts])
        if entry.loss:
            rows.append([*label, "loss", *_format_number(entry.loss)])
    lines = [f"Comparison of {names[0]} (first) with {names[1]} (second):", format_table(rows)]
    if len(rows) == 1:
        lines.append("Nothing to compare: no sample has a score or a loss in both.")
    if num_only_one := sum(entry.num_only_one for entry in comparison.sets):
        lines.append(f"Samples that one of the two has skipped: {num_only_one:,}")
    lines.append(f"Changed answers: {len(comparison.changed):,}")
    lines += [_format_change(change) for change in comparison.changed[:NUM_SHOWN]]
    return "\n".join(lines)


def _format_number(number: ComparedNumber) -> list[str]:
    paired = number.paired
    cells = [f"{number.value:.4f}", f"{number.other:.4f}", f"{paired.difference:+.4f}"]
    return [*cells, f"{paired.low:+.4f} to {paired.high:+.4f}", f"{paired.p_value:.3g}", paired.test]


def _format_change(change: dict) -> str:
    texts = [change.get("question", ""), change["prediction"], change["other_prediction"]]
    question, answer, other = (_shorten_text(text) for text in texts)
    score, other_score = ("-" if s is None else f"{s:.2f}" for s in (change["score"], change["other_score"]))
    lines = [
        f"  {change['set']} line {change['line']}: {question}",
        f"    first  {score:>5}  {answer}",
        f"    second {other_score:>5}  {other}",
    ]
    return "\n".join(lines)


def _shorten_text(text: str | None) -> str:
    """Show a text of any origin in one line."""
    text = escape_control_characters(" ".join((text or "").split()))
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 3]}..."
