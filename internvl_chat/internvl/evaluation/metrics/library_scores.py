"""Scores that public libraries compute: bleu, rouge_l, cer, wer.

Each library is imported by its own metric only.
"""

import logging
from collections.abc import Callable

import numpy as np

logger = logging.getLogger(__name__)

MAX_NGRAM = 4


def measure_bleu(records: list[dict]) -> np.ndarray:
    """Measure texts by BLEU (Papineni et al. 2002; Post 2018).

    Terms: BLEU of the sentence, matching and all n-grams of the prediction (4 + 4), length, length of the closest
    reference.
    """
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=True)
    results = [bleu.sentence_score(record["prediction"], record["references"]) for record in records]
    return np.array([(r.score, *r.counts, *r.totals, r.sys_len, r.ref_len) for r in results], np.float64)


def summarize_bleu(sums: np.ndarray, num_records: int) -> dict[str, np.ndarray]:
    """Compute the BLEU of the corpus with exponential smoothing, and the brevity penalty.

    The k-th n-gram length without a match has the precision 1 / (2**k * n-grams).
    """
    counts, totals = sums[..., 1 : 1 + MAX_NGRAM], sums[..., 1 + MAX_NGRAM : 1 + 2 * MAX_NGRAM]
    length, reference_length = sums[..., -2], sums[..., -1]
    num_missing = np.cumsum(counts == 0, -1)
    precisions = np.where(counts > 0, counts, 0.5**num_missing) / np.maximum(totals, 1)
    is_defined = (totals > 0).all(-1) & (counts > 0).any(-1)
    penalty = np.minimum(1, np.exp(1 - reference_length / np.maximum(length, 1))) * (length > 0)
    bleu = 100 * penalty * np.exp(np.log(precisions).mean(-1)) * is_defined
    return {"bleu": bleu, "brevity_penalty": penalty}


def measure_rouge_l(records: list[dict]) -> np.ndarray:
    """Measure texts by the F1 of the longest common subsequence of words (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    foreign = [text for record in records for text in record["references"] if _has_foreign_letters(text)]
    if foreign:
        logger.warning(
            "rouge_l ignores all but ASCII letters and digits: %d references have other letters, such as %.80r. "
            "Use cer or bleu for them.",
            len(foreign),
            foreign[0],
        )
    scores = [scorer.score_multi(record["references"], record["prediction"])["rougeL"].fmeasure for record in records]
    return np.array(scores, np.float64)[:, None]


def _has_foreign_letters(text: str) -> bool:
    return not text.isascii() and any(letter.isalpha() and not letter.isascii() for letter in text)


def measure_cer(records: list[dict]) -> np.ndarray:
    """Measure texts by their character error rate: rate, edits, length of the reference."""
    from jiwer import process_characters

    return _measure_errors(records, process_characters)


def measure_wer(records: list[dict]) -> np.ndarray:
    """Measure texts by their word error rate: rate, edits, length of the reference."""
    from jiwer import process_words

    return _measure_errors(records, process_words)


def _measure_errors(records: list[dict], process_fn: Callable) -> np.ndarray:
    """Return (N, 3) terms of the reference with the lowest rate, the first of them on a tie."""

    def measure(prediction: str, reference: str) -> tuple[float, int, int]:
        result = process_fn(reference, prediction)
        edits = result.substitutions + result.deletions + result.insertions
        length = result.hits + result.substitutions + result.deletions
        return edits / max(length, 1), edits, length

    rows = [[measure(record["prediction"], reference) for reference in record["references"]] for record in records]
    return np.array([min(row, key=lambda terms: terms[0]) for row in rows], np.float64)


def summarize_error_rates(sums: np.ndarray, num_records: int) -> dict[str, np.ndarray]:
    """Compute the rate of the corpus (all edits by all reference lengths) and the mean of the rates."""
    return {"corpus": sums[..., 1] / np.maximum(sums[..., 2], 1), "mean": sums[..., 0] / num_records}
