"""internvl/evaluation/statistics.py: intervals and tests against published numbers and simulations."""

import time

import numpy as np
import pytest
from helpers.metric_records import read_records

from internvl.evaluation.scores import METRICS, aggregate, measure
from internvl.evaluation.statistics import (
    bootstrap_difference,
    bootstrap_interval,
    compare_models,
    compute_interval,
    compute_wilson_interval,
    get_headline_fn,
    mcnemar_test,
    resample_sums,
)


def compute_mean(sums, num_records):
    return sums[..., 0] / num_records


def as_terms(scores) -> np.ndarray:
    return np.asarray(scores, np.float64)[:, None]


# Newcombe 1998, Two-sided confidence intervals for the single proportion, table I: right of all -> Wilson's interval.
WILSON_INTERVALS = {
    (81, 263): (0.2553, 0.3662),
    (15, 148): (0.0624, 0.1605),
    (0, 20): (0.0000, 0.1611),
    (1, 29): (0.0061, 0.1718),
}


@pytest.mark.parametrize("counts", WILSON_INTERVALS)
def test_wilson_intervals(counts):
    assert compute_wilson_interval(*counts) == pytest.approx(WILSON_INTERVALS[counts], abs=5e-5)
    right, total = counts
    low, high = compute_wilson_interval(total - right, total)
    assert (1 - high, 1 - low) == pytest.approx(compute_wilson_interval(*counts))


def test_wilson_interval_has_its_ends_within_0_and_1():
    for total in (1, 7, 10_000):
        assert compute_wilson_interval(0, total)[0] == 0
        assert compute_wilson_interval(total, total)[1] == 1


def test_exact_mcnemar_p_values():
    # Binomial distribution: 2 * sum of C(n, i) / 2**n for i up to the smaller number.
    assert mcnemar_test(12, 2) == mcnemar_test(2, 12) == 2 * (1 + 14 + 91) / 2**14
    assert mcnemar_test(5, 0) == 0.0625
    assert mcnemar_test(0, 0) == mcnemar_test(1, 0) == mcnemar_test(3, 3) == 1
    # The normal approximation with continuity correction gives 0.20489.
    assert mcnemar_test(3000, 3100) == pytest.approx(0.2049, abs=1e-4)
    assert mcnemar_test(20_000, 10_000) == 0


def test_bootstrap_interval_of_a_mean_is_the_normal_one_for_many_samples():
    scores = np.random.default_rng(0).normal(0.5, 0.2, 4000)
    low, high = bootstrap_interval(as_terms(scores), compute_mean)
    error = scores.std() / np.sqrt(len(scores))
    assert (low, high) == pytest.approx((scores.mean() - 1.96 * error, scores.mean() + 1.96 * error), abs=0.2 * error)


def test_coverage_of_the_intervals():
    """About 95 of 100 intervals hold the true value; with 100 samples a little fewer."""
    rng, runs = np.random.default_rng(3), 200
    samples = [as_terms(rng.beta(2, 5, 100)) for _ in range(runs)]
    held = [low <= 2 / 7 <= high for low, high in (bootstrap_interval(sample, compute_mean) for sample in samples)]
    assert 0.90 <= np.mean(held) <= 0.98
    shares = rng.random(2000)
    intervals = [compute_wilson_interval(int(rng.binomial(60, share)), 60) for share in shares]
    held = [low <= share <= high for share, (low, high) in zip(shares, intervals, strict=True)]
    assert 0.94 <= np.mean(held) <= 0.96


def test_same_records_give_the_same_interval():
    terms = as_terms(np.random.default_rng(0).random(50))
    state = np.random.get_state()[1].copy()
    assert bootstrap_interval(terms, compute_mean) == bootstrap_interval(terms, compute_mean)
    assert bootstrap_interval(terms, compute_mean) != bootstrap_interval(terms, compute_mean, seed=1)
    assert (np.random.get_state()[1] == state).all()  # the global generator is untouched


def test_resamples_draw_every_record_equally_often():
    sums = resample_sums(np.eye(5))  # how often each record is drawn
    assert (sums.sum(1) == 5).all()
    assert sums.mean(0) == pytest.approx(np.ones(5), abs=0.1)
    assert sums.var(0) == pytest.approx(np.full(5, 0.8), abs=0.1)  # binomial: n p (1 - p)


@pytest.mark.parametrize("metric", METRICS)
def test_interval_of_every_metric_holds_its_headline(metric):
    records = [record for record in read_records(metric) if record["references"]]
    terms = measure(metric, records)
    low, high = compute_interval(metric, terms)
    assert low < aggregate(metric, records) < high
    if METRICS[metric].is_binary:
        assert (low, high) == compute_wilson_interval(int(terms[:, 0].sum()), len(terms))


@pytest.mark.parametrize("metric", ["bleu", "wer"])
def test_resampled_corpus_metric_equals_scoring_the_resampled_records(metric):
    records = [record for record in read_records(metric) if record["references"]]
    terms = measure(metric, records)
    drawn = np.random.default_rng(0).integers(len(records), size=len(records))
    expected = aggregate(metric, [records[i] for i in drawn])
    assert get_headline_fn(metric)(terms[drawn].sum(0), len(drawn)) == pytest.approx(expected)


def test_interval_of_any_number_over_records():
    records = [record for record in read_records("yes_no") if record["references"]]
    terms = measure("yes_no", records)
    low, high = bootstrap_interval(terms, lambda sums, n: METRICS["yes_no"].summarize_fn(sums, n)["f1"])
    assert 0.2 < low < 0.386 < high < 0.55


def test_equal_models_do_not_differ():
    for metric in ("exact_match", "anls", "bleu"):
        terms = measure(metric, read_records(metric))
        assert compare_models(metric, terms, terms.copy())[:4] == (0, 0, 0, 1)


def test_difference_of_paired_models():
    rng = np.random.default_rng(0)
    hard = rng.random(500)  # both models find the same samples hard
    other = hard + rng.normal(0, 0.02, 500)
    better = hard + 0.01 + rng.normal(0, 0.02, 500)
    found = bootstrap_difference(as_terms(better), as_terms(other), compute_mean)
    assert found.difference == pytest.approx((better - other).mean())
    assert 0 < found.low < found.difference < found.high and found.p_value < 0.01
    assert found.test == "paired bootstrap"
    # Intervals of each model alone overlap widely.
    assert bootstrap_interval(as_terms(better), compute_mean)[0] < bootstrap_interval(as_terms(other), compute_mean)[1]
    reverse = bootstrap_difference(as_terms(other), as_terms(better), compute_mean)
    assert (reverse.low, reverse.high) == pytest.approx((-found.high, -found.low))


def test_p_values_of_equally_good_models_are_uniform():
    """About one of twenty comparisons of equally good models is below 0.05."""
    rng = np.random.default_rng(1)
    pairs = [(as_terms(rng.random(80)), as_terms(rng.random(80))) for _ in range(200)]
    p_values = [bootstrap_difference(first, second, compute_mean).p_value for first, second in pairs]
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.10
    assert 0.4 < np.mean(p_values) < 0.6


def test_binary_metrics_are_compared_by_mcnemar():
    right = as_terms([1.0] * 12 + [0.0] * 2 + [1.0] * 50)
    other = as_terms([0.0] * 12 + [1.0] * 2 + [1.0] * 50)
    found = compare_models("exact_match", right, other)
    assert found.test == "McNemar" and found.p_value == mcnemar_test(12, 2)
    assert found.difference == pytest.approx(10 / 64) and found.low > 0


def test_error_rates_are_compared_over_the_corpus():
    first, second = np.array([[0.5, 1, 2], [0, 0, 8]]), np.array([[0.5, 1, 2], [0.5, 4, 8]])
    assert compare_models("wer", first, second).difference == pytest.approx(0.1 - 0.5)


def test_ten_thousand_samples_take_a_second():
    terms = np.random.default_rng(0).random((10_000, 11))
    start = time.process_time()
    bootstrap_interval(terms, compute_mean)
    assert time.process_time() - start < 5  # 0.5 s on an idle machine
