"""Score of yes/no questions: yes_no.

Source: POPE (Li et al. 2023), whose positive class is yes.
"""

import re
from collections.abc import Callable

import numpy as np

from internvl.constants import shorten
from internvl.evaluation.metrics.vqa_scores import MARKS, remove_punctuation

INTERNVL_NO = {"No", "no", "not"}


def read_yes_no(text: str) -> str | None:
    """Return "yes" or "no", whichever of the two words is in the text; None for both or neither.

    Punctuation is removed as VLMEvalKit does: all of it where a comma stands between digits.
    """
    text, marks = text.lower(), f"{MARKS},?"
    if re.search(r"\d,\d", text):
        text = text.translate(str.maketrans("", "", marks))
    words = set(re.sub(r"(?<!\d)\.(?!\d)", "", remove_punctuation(text, marks)).split())
    found = words & {"yes", "no"}
    return found.pop() if len(found) == 1 else None


def read_yes_no_like_internvl(text: str) -> str:
    """Return "no" if the first sentence has one of the words `No`, `no` and `not`, else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if INTERNVL_NO.intersection(words) else "yes"


def measure_yes_no(records: list[dict], read_fn: Callable[[str], str | None] = read_yes_no) -> np.ndarray:
    """Measure answers: right, true positive, false positive, false negative, predicted yes.

    An answer that is neither yes nor no is wrong, and counts as no in precision and recall.
    """
    return np.array([_measure(read_fn(record["prediction"]), record["references"]) for record in records], np.float64)


def _measure(prediction: str | None, references: list[str]) -> tuple[bool, ...]:
    expected = read_yes_no(references[0])
    is_yes, should_be_yes = prediction == "yes", expected == "yes"
    return prediction == expected, is_yes and should_be_yes, is_yes > should_be_yes, is_yes < should_be_yes, is_yes


def summarize_yes_no(sums: np.ndarray, num_records: int) -> dict[str, np.ndarray]:
    """Compute accuracy, precision, recall, F1 and the share of yes; 0 where a denominator is 0."""
    right, true_positive, false_positive, false_negative, yes = np.moveaxis(sums, -1, 0)
    return {
        "accuracy": right / num_records,
        "precision": _divide(true_positive, true_positive + false_positive),
        "recall": _divide(true_positive, true_positive + false_negative),
        "f1": _divide(2 * true_positive, 2 * true_positive + false_positive + false_negative),
        "yes_ratio": yes / num_records,
    }


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return numerator / np.maximum(denominator, 1)  # counts


def find_yes_no_error(record: dict) -> str | None:
    """Return which reference is neither yes nor no."""
    reference = record["references"][0]
    is_right = isinstance(reference, str) and read_yes_no(reference) is not None
    return None if is_right else f"reference {shorten(reference)} is neither yes nor no"
