"""Score of captions: cider.

Source: Vedantam et al. 2015, CIDEr; this is its variant CIDEr-D, as the evaluation of COCO computes it.
"""

import math
from collections import Counter

import numpy as np

from internvl.evaluation.metrics.ptb_tokenizer import tokenize

MAX_NGRAM = 4
LENGTH_SIGMA = 6.0
DROPPED_TOKENS = set("'' ' `` ` . ? ! , : - -- ... ;".split())

Ngrams = Counter[tuple[str, ...]]


def measure_cider(records: list[dict]) -> np.ndarray:
    """Measure captions by CIDEr-D: n-grams that are rare in the references of these records count more.

    With one record all weights are 0, and so is its score.
    """
    predictions = [count_ngrams(record["prediction"]) for record in records]
    references = [[count_ngrams(text) for text in record["references"]] for record in records]
    num_documents = Counter(ngram for texts in references for ngram in set().union(*texts))
    weights = {ngram: math.log(len(records) / number) for ngram, number in num_documents.items()}
    unseen = math.log(len(records))
    scores = [
        np.mean([_compare(prediction, reference, weights, unseen) for reference in texts])
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return np.array(scores, np.float64)[:, None]


def tokenize_caption(text: str) -> list[str]:
    """Split a caption into lower-case tokens without punctuation; brackets stay, as -lrb- and -rrb-."""
    return [token for token in tokenize(text) if token not in DROPPED_TOKENS]


def count_ngrams(text: str) -> Ngrams:
    """Count the n-grams of 1 to 4 tokens of a caption."""
    words = " ".join(tokenize_caption(text)).split()  # a few tokens, such as 1 1/2, have a blank
    return Counter(
        tuple(words[start : start + n]) for n in range(1, MAX_NGRAM + 1) for start in range(len(words) - n + 1)
    )


def _compare(prediction: Ngrams, reference: Ngrams, weights: dict[tuple[str, ...], float], unseen: float) -> float:
    """Compute ten times the mean over n of the clipped cosine similarity of weighted n-grams.

    It decreases with the difference of the lengths, counted in bigrams.
    """
    products, norms, reference_norms = [0.0] * MAX_NGRAM, [0.0] * MAX_NGRAM, [0.0] * MAX_NGRAM
    for ngram, count in prediction.items():
        n, weight, reference_count = len(ngram) - 1, weights.get(ngram, unseen), reference[ngram]
        norms[n] += (count * weight) ** 2
        products[n] += min(count, reference_count) * reference_count * weight**2
    for ngram, count in reference.items():
        reference_norms[len(ngram) - 1] += (count * weights[ngram]) ** 2
    scales = [math.sqrt(norm * reference_norm) for norm, reference_norm in zip(norms, reference_norms, strict=True)]
    similarity = sum(product / (scale or 1) for product, scale in zip(products, scales, strict=True)) / MAX_NGRAM
    difference = _count_bigrams(prediction) - _count_bigrams(reference)
    return 10 * similarity * math.exp(-(difference**2) / (2 * LENGTH_SIGMA**2))


def _count_bigrams(ngrams: Ngrams) -> int:
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
