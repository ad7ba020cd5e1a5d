"""internvl/evaluation/comparison.py: two evaluations of the same samples, on known numbers."""

import json

import pytest

from internvl.evaluation.comparison import compare_predictions, compare_results, format_comparison, write_comparison
from internvl.evaluation.results import write_results

CONTENT = {"step": None, "metrics": {}, "sets": {}, "settings": {"max_new_tokens": 8, "num_samples": None}}


def make_predictions(answers, losses=None, name="digits", metric="exact_match", references=("7",), root="/a", **keys):
    """Build the lines of a set; an answer of None is a sample that was not asked."""
    lines = []
    for index, answer in enumerate(answers):
        loss, tokens = losses[index] if losses else (None, 0)
        lines.append(
            {
                "set": name,
                "line": index + 1,
                "file": f"{root}/{name}.jsonl",
                "images": [f"{root}/{index}.png"],
                "question": f"Which digit is image {index}?",
                "references": list(references),
                "prediction": answer,
                "metric": metric,
                "score": None if answer is None else float(answer == "7"),
                "loss": loss,
                "tokens": tokens,
                "correct": 0,
                **keys,
            }
        )
    return lines


def test_scores_of_0_and_1_are_compared_by_mcnemar():
    # right in both: 2, only in the first: 6, only in the second: 1, in none: 1
    first = make_predictions(["7"] * 8 + ["1", "1"])
    second = make_predictions(["7"] * 2 + ["2"] * 6 + ["7", "1"], root="/moved")
    [entry], changed = compare_predictions(first, second)
    assert (entry.num_samples, entry.num_answers, entry.num_better, entry.num_worse) == (10, 10, 6, 1)
    assert (entry.score.value, entry.score.other) == (0.8, 0.3) and entry.loss is None
    paired = entry.score.paired
    assert paired.difference == pytest.approx(0.5) and paired.test == "McNemar"
    assert paired.p_value == pytest.approx(2 * (1 + 7) / 2**7)
    assert 0 < paired.low < 0.5 < paired.high < 1
    assert [line["line"] for line in changed] == [3, 4, 5, 6, 7, 8, 9]
    assert changed[0] == first[2] | {"other_prediction": "2", "other_score": 0.0, "other_loss": None}


def test_other_numbers_are_compared_by_the_paired_bootstrap():
    """A lower error rate is better; a loss is the mean over tokens."""
    rates = {"metric": "cer", "references": ["abcd"]}
    first = make_predictions(["abcd"] * 12, [(1.0, 1), (2.0, 3)] * 6, **rates)
    second = make_predictions(["abxy"] * 12, [(2.0, 1), (3.0, 3)] * 6, **rates)
    [entry], _ = compare_predictions(first, second)
    assert (entry.num_better, entry.num_worse) == (12, 0)
    assert (entry.score.value, entry.score.other) == (0.0, 0.5)
    assert entry.score.paired[:4] == pytest.approx((-0.5, -0.5, -0.5, 2 / 2**11), abs=1e-3)
    assert entry.score.paired.test == entry.loss.paired.test == "paired bootstrap"
    assert (entry.loss.value, entry.loss.other) == (1.75, 2.75)
    assert entry.loss.paired.difference == pytest.approx(-1) and entry.loss.paired.p_value < 0.01


def test_one_or_two_samples_prove_nothing():
    for number in (1, 2):
        lines = [make_predictions([None] * number, [(loss, 4)] * number, metric=None) for loss in (1.0, 2.0)]
        [entry], changed = compare_predictions(*lines)
        assert entry.score is None and entry.loss.paired.p_value == 2 / 2**number and changed == []


def test_equal_evaluations_have_no_difference():
    lines = make_predictions(["7", "1", "7"], [(0.5, 2)] * 3)
    [entry], changed = compare_predictions(lines, lines)
    assert entry.score.paired[:4] == entry.loss.paired[:4] == (0, 0, 0, 1) and changed == []
    assert (entry.num_better, entry.num_worse) == (0, 0)


def test_only_what_both_have_is_compared():
    """Samples that were not asked, losses over other tokens, samples that one has skipped."""
    first = make_predictions(["7", None, "7", "7"], [(1.0, 2), (1.0, 2), (None, 0), (1.0, 5)])
    second = make_predictions(["1", "7", "7"], [(2.0, 2), (2.0, 3), (2.0, 4)])
    with pytest.raises(ValueError, match="not about the same samples: 1 are only in the first one, .* digits line 4"):
        compare_predictions(first, second)
    with pytest.raises(ValueError, match="1 are only in the second one"):
        compare_predictions(second, first)
    [entry], _ = compare_predictions(first, second, skipped_by_other=[("digits", 4)])
    assert (entry.num_samples, entry.num_only_one, entry.num_answers) == (3, 1, 2)
    assert (entry.loss.value, entry.loss.other) == (1.0, 2.0)


OTHER_SAMPLES = {
    "another question": (
        {"question": "Why?"},
        "question of set digits line 1 is 'Which digit is image 0\\?'.* 'Why\\?'",
    ),
    "another reference": ({"references": ["8"]}, "references of set digits line 1"),
    "another image": ({"images": ["/a/9.png"]}, r"images of set digits line 1 is \['0.png'\]"),
    "another metric": ({"metric": "cer"}, "metric of set digits line 1"),
    "another history": ({"history": [["a", "b"]]}, "history of set digits line 1"),
    "another set": ({"set": "letters"}, "1 are only in the first one, such as set digits line 1"),
    "another line": ({"line": 2}, "1 are only in the first one, such as set digits line 1"),
}


@pytest.mark.parametrize("changes, message", OTHER_SAMPLES.values(), ids=OTHER_SAMPLES)
def test_other_samples_are_refused(changes, message):
    [line] = make_predictions(["7"])
    with pytest.raises(ValueError, match=f"^the evaluations are not about the same samples: .*{message}"):
        compare_predictions([line], [line | changes])


def test_a_sample_that_is_there_twice_is_refused():
    [line] = make_predictions(["7"])
    with pytest.raises(ValueError, match="have set digits line 1 twice"):
        compare_predictions([line], [line, line])


def test_results_of_other_settings_are_refused(tmp_path):
    for number, name in ((8, "a"), (9, "b")):
        settings = {"max_new_tokens": number, "num_samples": None}
        write_results(tmp_path / name, make_predictions(["7"]), CONTENT | {"settings": settings})
    with pytest.raises(ValueError, match="the answers in .*b have other settings: expected .*8.* got .*9"):
        compare_results(tmp_path / "a", tmp_path / "b")


def test_files_and_printed_text(tmp_path):
    write_results(tmp_path / "a", make_predictions(["7", "7"], [(0.5, 2)] * 2), CONTENT)
    skipped = [{"dataset": "digits", "file": "/a", "line": 2, "reason": "gone"}]
    write_results(tmp_path / "b", make_predictions(["\x1b[1m\n" * 99], [(0.75, 2)]), CONTENT | {"skipped": skipped})
    comparison = compare_results(tmp_path / "a", tmp_path / "b")
    write_comparison(tmp_path, comparison, ("runs/new", "base"))
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["names"] == ["runs/new", "base"] and content["sets"][0]["score"]["difference"] == 1.0
    assert content["sets"][0]["loss"]["test"] == "paired bootstrap" and content["sets"][0]["num_only_one"] == 1
    [line] = (tmp_path / "changed.jsonl").read_text().splitlines()
    assert json.loads(line)["other_score"] == 0.0
    printed = format_comparison(comparison, ("runs/new", "base")).splitlines()
    assert printed[0] == "Comparison of runs/new (first) with base (second):"
    assert printed[2].split() == "digits 1 exact_match 1.0000 0.0000 +1.0000 +1.0000 to +1.0000 1 McNemar 1 0".split()
    assert printed[3].split() == "digits 1 loss 0.5000 0.7500 -0.2500 -0.2500 to -0.2500 1 paired bootstrap".split()
    assert printed[4:6] == ["Samples that one of the two has skipped: 1", "Changed answers: 1"]
    assert printed[6:8] == ["  digits line 1: Which digit is image 0?", "    first   1.00  7"]
    assert printed[8].startswith(r"    second  0.00  \x1b[1m \x1b[1m") and len(printed[8]) == 18 + 60
