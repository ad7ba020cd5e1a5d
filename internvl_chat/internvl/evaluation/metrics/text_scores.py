"""Scores of texts: exact_match, anls, token_f1."""

import re
import string
from collections import Counter

PUNCTUATION = str.maketrans("", "", string.punctuation)
ANLS_THRESHOLD = 0.5


def score_exact_match(record: dict) -> float:
    """Compare texts, trimmed and lower-cased."""
    prediction = record["prediction"].strip().lower()
    return float(any(prediction == reference.strip().lower() for reference in record["references"]))


def score_anls(record: dict) -> float:
    """Compute the average normalized Levenshtein similarity.

    0 below the threshold. Lengths are those of the raw texts, as in InternVL, VLMEvalKit and lmms-eval: blanks around a
    prediction raise the similarity.

    Source: Biten et al. 2019, Scene Text Visual Question Answering.
    """
    prediction = record["prediction"]
    distance = min(_compute_relative_distance(prediction, reference) for reference in record["references"])
    similarity = 1 - distance
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def _compute_relative_distance(prediction: str, reference: str) -> float:
    length = max(len(reference.upper()), len(prediction.upper()))
    distance = levenshtein(_collapse(prediction), _collapse(reference))
    return distance / length if length else 0.0


def _collapse(text: str) -> str:
    return " ".join(text.lower().split())


def levenshtein(first: str, second: str) -> int:
    """Count the insertions, deletions and replacements between two texts."""
    row = list(range(len(second) + 1))  # distances of the first text's beginning to each beginning of the second
    for i, left in enumerate(first):
        diagonal, row[0] = row[0], i + 1
        for j, right in enumerate(second):
            best = diagonal if left == right else 1 + min(diagonal, row[j], row[j + 1])
            diagonal, row[j + 1] = row[j + 1], best
    return row[-1]


def score_token_f1(record: dict) -> float:
    """Compute the F1 of the words, as SQuAD 2.0 does (Rajpurkar et al. 2018)."""
    prediction = split_words(record["prediction"])
    references = [words for words in map(split_words, record["references"]) if words] or [[]]
    return max(compute_f1(prediction, reference) for reference in references)


def split_words(text: str) -> list[str]:
    """Split into lower-case words without ASCII punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def compute_f1(prediction: list[str], reference: list[str]) -> float:
    """Compute the F1 of two bags of words; two empty ones are equal."""
    if not prediction or not reference:
        return float(prediction == reference)
    common = (Counter(prediction) & Counter(reference)).total()
    return 2 * common / (len(prediction) + len(reference))
