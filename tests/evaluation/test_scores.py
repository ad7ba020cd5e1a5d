"""internvl/evaluation/scores.py: recorded scores of the public programs, and what all metrics have in common."""

import logging
import sys

import numpy as np
import pytest
from helpers.metric_records import read_aggregate, read_records

from internvl.constants import shorten
from internvl.data.schema import METRIC_NAMES, SCORERS
from internvl.evaluation.metrics.box_scores import compute_record_iou, parse_box
from internvl.evaluation.metrics.caption_scores import tokenize_caption
from internvl.evaluation.metrics.choice_scores import extract_letter
from internvl.evaluation.metrics.number_scores import extract_number, format_number
from internvl.evaluation.metrics.vqa_scores import normalize_answer
from internvl.evaluation.metrics.yes_no_scores import read_yes_no, read_yes_no_like_internvl
from internvl.evaluation.scores import (
    INTERNVL_SCORER,
    METRICS,
    aggregate,
    compute_details,
    find_record_error,
    measure,
    score,
    score_all,
)

TOLERANCES = {"box_iou": 1e-5, "bleu": 1e-4}
HEADLINES = {"yes_no": "accuracy", "box_iou": "accuracy_at_0.5", "cer": "corpus", "wer": "corpus"}
HEADLINES |= {name: name for name in ("bleu", "cider")}


def assert_scores(metric: str, scores: list, expected: list):
    records = read_records(metric)
    assert len(scores) == len(expected) == len(records) > 60
    for record, value, wanted in zip(records, scores, expected, strict=True):
        assert (value is None) == (wanted is None), record
        if wanted is not None:
            assert value == pytest.approx(wanted, abs=TOLERANCES.get(metric, 1e-6)), record


@pytest.mark.parametrize("metric", METRICS)
def test_scores_of_all_recorded_predictions(metric):
    records = read_records(metric)
    scores = score_all(metric, records, INTERNVL_SCORER)
    assert_scores(metric, scores, [record["score"] for record in records])
    recorded = read_aggregate(metric)
    assert aggregate(metric, records, INTERNVL_SCORER) == pytest.approx(
        recorded[HEADLINES.get(metric, "mean")], abs=1e-6
    )
    details = compute_details(metric, records, INTERNVL_SCORER)
    for name in details.keys() & recorded.keys():
        assert details[name] == pytest.approx(recorded[name], abs=1e-6)
    assert "yes_no" not in metric or {"precision", "recall", "f1", "yes_ratio"} <= details.keys() & recorded.keys()


@pytest.mark.parametrize("metric", [name for name in METRICS if name not in ("relaxed_accuracy", "yes_no", "cider")])
def test_one_record_has_the_same_score(metric):
    records = read_records(metric)
    scores = [score(metric, record) if record["references"] else None for record in records]
    assert_scores(metric, scores, [record["score"] for record in records])


def test_relaxed_accuracy_is_relative_to_the_reference():
    records = read_records("relaxed_accuracy")
    expected = [record["others"]["vlmevalkit"] if record["references"] else None for record in records]
    assert_scores("relaxed_accuracy", score_all("relaxed_accuracy", records), expected)
    assert sum(record["score"] != wanted for record, wanted in zip(records, expected, strict=True)) == 5


def test_yes_no_reads_as_recorded_by_vlmevalkit():
    records = read_records("yes_no")
    scorable = [record for record in records if record["references"]]
    readings = [record["others"]["vlmevalkit"].lower() for record in scorable]
    assert [read_yes_no(record["prediction"]) or "unknown" for record in scorable] == readings
    expected = iter(
        float(reading == record["references"][0]) for reading, record in zip(readings, scorable, strict=True)
    )
    assert_scores(
        "yes_no", score_all("yes_no", records), [next(expected) if r["references"] else None for r in records]
    )
    recorded = read_aggregate("yes_no")["others"]["vlmevalkit_percent"]
    assert 100 * aggregate("yes_no", records) == pytest.approx(recorded["acc"])
    details = compute_details("yes_no", records)
    assert 100 * details["precision"] == pytest.approx(recorded["precision"])
    assert 100 * details["recall"] == pytest.approx(recorded["recall"])
    assert 100 * details["f1"] == pytest.approx(recorded["Overall"])


# What the public programs read in an answer, by metric.
READINGS = {
    "multiple_choice": lambda r: (extract_letter(r["prediction"], r["choices"]), r["extracted"]),
    "yes_no": lambda r: (read_yes_no_like_internvl(r["prediction"]), r["extracted"]),
    "vqa_accuracy": lambda r: (normalize_answer(r["prediction"]), r["normalised"]),
    "number": lambda r: (
        format_number(extract_number(r["prediction"]), r["answer_type"], r["precision"]),
        r["extracted"],
    ),
    "box_iou": lambda r: (
        [str(value) for value in parse_box(r["prediction"]) or ()],
        [str(value) for value in r["parsed"] or ()],
    ),
    "cider": lambda r: (
        [" ".join(tokenize_caption(text)) for text in (r["prediction"], *r["references"])],
        [r["tokens"]["prediction"], *r["tokens"]["references"]],
    ),
}


@pytest.mark.parametrize("metric", READINGS)
def test_answers_are_read_as_recorded(metric):
    records = [record for record in read_records(metric) if record["references"]]
    for record in records:
        reading, recorded = READINGS[metric](record)
        assert reading == recorded, record


def test_ious_equal_the_recorded_ones_in_all_bits():
    records = [record for record in read_records("box_iou") if record["references"]]
    assert [compute_record_iou(record) for record in records] == [record["iou"] for record in records]


def test_cider_of_one_record_is_zero():
    records = read_records("cider")
    assert score("cider", records[0]) == aggregate("cider", records[:1]) == 0
    assert score_all("cider", records[:20])[0] != pytest.approx(records[0]["score"], abs=0.01)


# -- common to all metrics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_records_without_references(metric):
    record = read_records(metric)[0] | {"references": []}
    with pytest.raises(ValueError, match=f"Record '{record['id']}' cannot be scored: it has no references"):
        score(metric, record)
    assert score_all(metric, [record, record]) == [None, None]
    with pytest.raises(ValueError, match=f"{metric} cannot be computed: none of 2 records has references"):
        aggregate(metric, [record, record])


@pytest.mark.parametrize("metric", METRICS)
def test_empty_predictions_are_scored(metric):
    record = read_records(metric)[0] | {"prediction": ""}
    assert np.isfinite(score(metric, record))
    assert np.isfinite(aggregate(metric, [record, read_records(metric)[1]]))


@pytest.mark.parametrize("metric", METRICS)
def test_missing_keys_are_named(metric):
    for key in ("prediction", *METRICS[metric].required_keys):
        record = {k: v for k, v in read_records(metric)[0].items() if k != key}
        with pytest.raises(ValueError, match=f"Record '.*' cannot be scored by {metric}: it lacks '{key}'"):
            score(metric, record)


def test_scorer_of_the_record_counts_where_it_is_internvl():
    record = {"prediction": "no.5", "references": ["no"]}
    assert score("yes_no", record) == 0
    assert score("yes_no", record | {"scorer": "internvl"}) == score("yes_no", record, "internvl") == 1
    assert score("yes_no", record | {"scorer": "another program 1.0"}) == 0
    with pytest.raises(ValueError, match="scorer 'vlmevalkit' is invalid: expected 'internvl' or None"):
        score("yes_no", record, "vlmevalkit")


def test_each_record_is_read_by_its_own_scorer():
    records = [{"prediction": "no.5", "references": ["no"]} | extra for extra in ({}, {"scorer": "internvl"})]
    for mixed in (records, records[::-1]):
        assert score_all("yes_no", mixed) == [score("yes_no", record) for record in mixed]
        assert aggregate("yes_no", mixed) == 0.5
    assert aggregate("yes_no", records, "internvl") == 1


def test_names_of_metrics_are_those_of_the_meta_file():
    assert tuple(METRICS) == METRIC_NAMES
    assert (INTERNVL_SCORER,) == SCORERS
    with pytest.raises(ValueError, match="metric 'f1' is unknown: expected one of exact_match, vqa_accuracy"):
        score("f1", {"prediction": "", "references": [""]})


@pytest.mark.parametrize(
    ("metric", "package"), [(name, METRICS[name].library) for name in METRICS if METRICS[name].library]
)
def test_missing_library_is_named(metric, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)  # as if it were not installed
    with pytest.raises(ValueError, match=f"metric {metric} requires the package {package}: python3 -m pip install"):
        score(metric, read_records(metric)[0])


@pytest.mark.parametrize("metric", [name for name in METRICS if METRICS[name].is_binary])
def test_binary_metrics_have_binary_scores(metric):
    assert {*score_all(metric, read_records(metric))} == {0.0, 1.0, None}
    assert metric not in ("cer", "wer") and METRICS[metric].greater_is_better


@pytest.mark.parametrize("metric", METRICS)
def test_terms_add_up(metric):
    """Numbers over records are functions of the sums of terms, also for many sums at once."""
    terms = measure(metric, read_records(metric))
    summarize_fn = METRICS[metric].summarize_fn
    sums = np.stack([terms.sum(0), 2 * terms.sum(0)])
    stacked = summarize_fn(sums, len(terms))
    for name, value in summarize_fn(terms.sum(0), len(terms)).items():
        assert stacked[name].shape == (2,) and stacked[name][0] == pytest.approx(value)
    assert terms.dtype == np.float64


def test_bleu_of_a_corpus_is_that_of_sacrebleu():
    import sacrebleu

    records = read_records("bleu")
    for chosen in (records, records[::7], records[-8:-5], [r for r in records if r["score"] == 0]):
        most = max(len(record["references"]) for record in chosen)
        columns = [[dict(enumerate(record["references"])).get(k) for record in chosen] for k in range(most)]
        expected = sacrebleu.corpus_bleu([record["prediction"] for record in chosen], columns)
        assert aggregate("bleu", chosen) == pytest.approx(expected.score, abs=1e-9)
        assert compute_details("bleu", chosen)["brevity_penalty"] == pytest.approx(expected.bp)


def test_rouge_l_warns_of_letters_that_it_ignores(caplog):
    record = {"prediction": "caf", "references": ["coffee", "café"]}
    with caplog.at_level(logging.WARNING):
        assert score("rouge_l", record) == 1
    assert (
        "rouge_l ignores all but ASCII letters and digits: 1 references have other letters, such as 'café'"
        in caplog.text
    )
    caplog.clear()
    score("rouge_l", record | {"references": ["50 € – “ok”"]})
    assert not caplog.text


INVALID_VALUES = {
    "prediction as number": ("anls", {"prediction": 3}, "prediction 3 is not a text"),
    "prediction as list": ("cider", {"prediction": ["cat"]}, "prediction ['cat'] is not a text"),
    "references as text": ("exact_match", {"references": "cat"}, "expected a list of references, got 'cat'"),
    "references as object": ("bleu", {"references": {"a": 1}}, "expected a list of references, got {'a': 1}"),
    "reference as number": ("wer", {"references": ["cat", 3]}, "reference 3 is not a text"),
    "count as number": ("counting", {"references": [3]}, "reference 3 is not a text"),
    "number as number": (
        "number",
        {"references": [3], "answer_type": "integer"},
        "reference 3 is not the text of a number",
    ),
    "precision as text": (
        "number",
        {"references": ["0.5"], "answer_type": "float", "precision": "1"},
        "precision '1' is invalid: expected the number of decimals",
    ),
    "another letter": (
        "multiple_choice",
        {"references": ["C"], "choices": {"A": "cat", "B": "dog"}},
        "reference 'C' is not one of the choices A, B",
    ),
    "three sides": (
        "box_iou",
        {"references": [[1, 2, 3]], "width": 9, "height": 9},
        "reference [1, 2, 3] is not a box [x1, y1, x2, y2]",
    ),
    "width 0": (
        "box_iou",
        {"references": [[1, 2, 3, 4]], "width": 0, "height": 9},
        "width 0 is invalid: expected the width of the image in pixels",
    ),
    "maybe": ("yes_no", {"references": ["maybe"]}, "reference 'maybe' is neither yes nor no"),
}


@pytest.mark.parametrize("compute_fn", [score, score_all, aggregate, compute_details])
@pytest.mark.parametrize("case", INVALID_VALUES)
def test_invalid_values_are_named(case, compute_fn):
    metric, values, error = INVALID_VALUES[case]
    record = {"id": 7, "prediction": "cat", "references": ["cat"]} | values
    with pytest.raises(ValueError) as caught:
        compute_fn(metric, record if compute_fn is score else [record])
    assert str(caught.value) == f"Record 7 cannot be scored by {metric}: {error}."


# -- records before there is a prediction ------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [name for name in METRICS if name not in ("counting", "number")])
def test_recorded_records_have_no_error(metric):
    assert list_record_errors(metric) == []


def test_recorded_numbers_that_no_answer_matches_have_an_error():
    errors = list_record_errors("number")
    assert len(errors) == 3 and all("matches no answer: write it as" in error for error in errors)


def list_record_errors(metric: str) -> list[str]:
    records = [record for record in read_records(metric) if record["references"]]
    return [error for record in records if (error := find_record_error(metric, record))]


BOX = {"references": [[1, 2, 30, 40]], "width": 100, "height": 50}
CHOICE = {"references": ["B"], "choices": {"A": "cat", "B": "dog"}}
NUMBER = {"references": ["2.5"], "answer_type": "float", "precision": 1}
RECORD_ERRORS = {
    "empty list": ("anls", {"references": []}, "expected a list of at least one reference, got []"),
    "no list": ("anls", {"references": "cat"}, "expected a list of at least one reference, got 'cat'"),
    "no references": ("anls", {}, "expected a list of at least one reference, got None"),
    "number as reference": ("cer", {"references": ["a", 3]}, "reference 3 is not a text"),
    "no choices": ("multiple_choice", CHOICE | {"choices": None}, "lacks 'choices'"),
    "list of choices": (
        "multiple_choice",
        CHOICE | {"choices": ["cat"]},
        "choices ['cat'] are invalid: expected an object of letter -> text",
    ),
    "long letters": (
        "multiple_choice",
        CHOICE | {"choices": {"AB": "cat"}},
        "choices {'AB': 'cat'} are invalid: expected an object of letter -> text",
    ),
    "another letter": (
        "multiple_choice",
        CHOICE | {"references": ["C"]},
        "reference 'C' is not one of the choices A, B",
    ),
    "maybe": ("yes_no", {"references": ["maybe"]}, "reference 'maybe' is neither yes nor no"),
    "no width": ("box_iou", BOX | {"width": None}, "lacks 'width'"),
    "width beyond floats": (
        "box_iou",
        BOX | {"width": 10**400},
        f"width {shorten(10**400)} is invalid: expected the width of the image in pixels",
    ),
    "height 0": ("box_iou", BOX | {"height": 0}, "height 0 is invalid: expected the height of the image in pixels"),
    "three numbers": (
        "box_iou",
        BOX | {"references": [[1, 2, 3]]},
        "reference [1, 2, 3] is not a box [x1, y1, x2, y2]",
    ),
    "text without box": (
        "box_iou",
        BOX | {"references": ["here"]},
        "reference 'here' has no box [x1, y1, x2, y2]",
    ),
    "count as word": ("counting", {"references": ["four"]}, "reference 'four' is not a text of digits"),
    "no answer type": ("number", {"references": ["3"]}, "lacks 'answer_type'"),
    "answer type": (
        "number",
        NUMBER | {"answer_type": "text"},
        "answer_type 'text' is invalid: expected 'integer' or 'float'",
    ),
    "no precision": (
        "number",
        NUMBER | {"precision": None},
        "precision None is invalid: expected the number of decimals",
    ),
    "infinite precision": (
        "number",
        NUMBER | {"precision": float("inf")},
        "precision inf is invalid: expected the number of decimals",
    ),
    "half a decimal": (
        "number",
        NUMBER | {"precision": 0.5},
        "precision 0.5 is invalid: expected the number of decimals",
    ),
    "negative precision": (
        "number",
        NUMBER | {"precision": -1},
        "precision -1 is invalid: expected the number of decimals",
    ),
    "truth as precision": (
        "number",
        NUMBER | {"precision": True},
        "precision True is invalid: expected the number of decimals",
    ),
    "trailing zero": (
        "number",
        NUMBER | {"references": ["0.50"], "precision": 2},
        "reference '0.50' matches no answer: write it as '0.5'",
    ),
    "decimals of an integer": (
        "number",
        {"references": ["18.0"], "answer_type": "integer"},
        "reference '18.0' matches no answer: write it as '18'",
    ),
    "no number": ("number", NUMBER | {"references": ["much"]}, "reference 'much' is not the text of a number"),
}


@pytest.mark.parametrize("case", RECORD_ERRORS)
def test_errors_of_records(case):
    metric, record, error = RECORD_ERRORS[case]
    assert find_record_error(metric, record) == error


def test_references_may_be_answers_as_the_model_gives_them():
    """The last turn of a training record is a reference, too."""
    records = {
        "multiple_choice": CHOICE | {"references": ["B. dog"], "prediction": "(b)"},
        "yes_no": {"references": ["Yes, there is."], "prediction": "yes"},
        "box_iou": BOX | {"references": ["<box>[[10, 40, 300, 800]]</box>"], "prediction": "[0.01, 0.04, 0.3, 0.8]"},
    }
    for metric, record in records.items():
        assert find_record_error(metric, record) is None
        assert score(metric, record) == 1
