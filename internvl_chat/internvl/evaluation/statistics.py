"""Intervals and tests of evaluation numbers.

Scores of 0 or 1 have exact methods; other numbers are resampled. A number over records is a function of the sums of
their terms (see `scores.py`), so that a resample costs one weighted sum. All random numbers come from a generator with
a fixed seed: the same records give the same interval.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from internvl.evaluation.scores import get_metric

Z_95 = 1.959963984540054  # of the standard normal distribution, two-sided
PERCENTILES_95 = (2.5, 97.5)
NUM_RESAMPLES = 2000
CHUNK_ELEMENTS = 2**22  # weights that are in memory at once

# Sums of terms (R, K) and number of records -> values (R,)
ComputeFn = Callable[[np.ndarray, int], np.ndarray]


class PairedDifference(NamedTuple):
    """The difference of two models on the same records.

    Attributes:
        low, high: 95 % interval of the difference, by the paired bootstrap.
        p_value: of the hypothesis that both are equally good, two-sided.
        test: the name of the test.
    """

    difference: float
    low: float
    high: float
    p_value: float
    test: str


def compute_interval(metric: str, terms: np.ndarray) -> tuple[float, float]:
    """Compute the 95 % interval of the headline number of a metric.

    Wilson's for scores of 0 or 1, by bootstrap for others.

    Args:
        terms: (N, K) of `scores.measure`, N >= 1.
    """
    if get_metric(metric).is_binary:
        return compute_wilson_interval(int(terms[:, 0].sum()), len(terms))
    return bootstrap_interval(terms, get_headline_fn(metric))


def compare_models(metric: str, terms: np.ndarray, other_terms: np.ndarray) -> PairedDifference:
    """Compare the headline number of two models: terms - other_terms.

    The test is McNemar's for scores of 0 or 1, the paired bootstrap for others.

    Args:
        terms, other_terms: (N, K) of `scores.measure`, of the same records in the same order.
    """
    paired = bootstrap_difference(terms, other_terms, get_headline_fn(metric))
    if not get_metric(metric).is_binary:
        return paired
    gains = terms[:, 0] - other_terms[:, 0]
    return paired._replace(p_value=mcnemar_test(int((gains > 0).sum()), int((gains < 0).sum())), test="McNemar")


def get_headline_fn(metric: str) -> ComputeFn:
    """Return the function that computes the headline number of a metric from sums of terms."""
    summarize_fn = get_metric(metric).summarize_fn
    return lambda sums, num_records: next(iter(summarize_fn(sums, num_records).values()))


def compute_wilson_interval(num_right: int, num_samples: int) -> tuple[float, float]:
    """Compute the 95 % score interval of a proportion.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    share, weight = num_right / num_samples, Z_95**2 / num_samples
    center = (share + weight / 2) / (1 + weight)
    half = np.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    # The ends at 0 and 1 are exact; rounding errors would pass them.
    low = 0.0 if num_right == 0 else center - half
    return float(low), float(1.0 if num_right == num_samples else center + half)


def bootstrap_interval(terms: np.ndarray, compute_fn: ComputeFn, seed: int = 0) -> tuple[float, float]:
    """Compute the 95 % interval of a number over records.

    Percentiles of the number over resampled records. Source: Efron 1979, Bootstrap methods.

    Args:
        terms: (N, K).
    """
    values = compute_fn(resample_sums(terms, seed), len(terms))
    low, high = np.percentile(values, PERCENTILES_95)
    return float(low), float(high)


def bootstrap_difference(
    terms: np.ndarray, other_terms: np.ndarray, compute_fn: ComputeFn, seed: int = 0
) -> PairedDifference:
    """Compare a number of two models over the same records, which are resampled together.

    The p value is twice the share of resamples whose difference is not on the side of most others, at most 1; it is
    below 0.05 about where the interval excludes 0. Source: Koehn 2004, Statistical significance tests for machine
    translation evaluation.

    Args:
        terms, other_terms: (N, K) of the same records in the same order.
    """
    num_records, num_terms = terms.shape

    def compute_difference(sums: np.ndarray) -> np.ndarray:
        own, other = sums[..., :num_terms], sums[..., num_terms:]
        # Without rounding, equal models would differ in the order of their sums.
        return np.round(compute_fn(own, num_records) - compute_fn(other, num_records), 12)

    both = np.concatenate([terms, other_terms], axis=1)
    differences = compute_difference(resample_sums(both, seed))
    low, high = np.percentile(differences, PERCENTILES_95)
    num_opposite = min((differences <= 0).sum(), (differences >= 0).sum())
    # Of n differences, all with the same sign, no test has a smaller p value than 2 / 2^n.
    p_value = min(1.0, max(2.0 ** (1 - num_records), 2 * (num_opposite + 1) / (len(differences) + 1)))
    difference = float(compute_difference(both.sum(0)))
    return PairedDifference(difference, float(low), float(high), float(p_value), "paired bootstrap")


def resample_sums(terms: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the sums (R, K) of terms (N, K) over N records drawn with replacement, R times."""
    rng, num_records = np.random.default_rng(seed), len(terms)
    chunk = max(1, CHUNK_ELEMENTS // num_records)
    sums = [
        _draw_weights(rng, min(chunk, NUM_RESAMPLES - start), num_records) @ terms
        for start in range(0, NUM_RESAMPLES, chunk)
    ]
    return np.concatenate(sums)


def _draw_weights(rng: np.random.Generator, num_resamples: int, num_records: int) -> np.ndarray:
    """Return how often each record is drawn in each resample: (num_resamples, num_records)."""
    drawn = rng.integers(num_records, size=(num_resamples, num_records))
    drawn += num_records * np.arange(num_resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=num_resamples * num_records)
    return counts.reshape(num_resamples, num_records).astype(np.float64)


def mcnemar_test(num_better: int, num_worse: int) -> float:
    """Compute the exact two-sided p value of paired scores of 0 or 1.

    Source: McNemar 1947, Note on the sampling error of the difference between correlated proportions or percentages.
    Here the distribution is the binomial one, not its approximation.

    Args:
        num_better: records that are right only in the first of both models.
        num_worse: records that are right only in the second.
    """
    num_changed, ways = num_better + num_worse, 1
    num_ways = 0  # to have at most min(num_better, num_worse) on one side
    for number in range(min(num_better, num_worse) + 1):
        num_ways += ways
        ways = ways * (num_changed - number) // (number + 1)
    return min(1.0, 2 * num_ways / 2**num_changed)
