"""The scores' rules, one by one: what recorded predictions do not show."""

import time

import pytest
from helpers.metric_records import read_lines

from internvl.evaluation.metrics.caption_scores import tokenize_caption
from internvl.evaluation.metrics.choice_scores import extract_letter
from internvl.evaluation.metrics.number_scores import parse_count
from internvl.evaluation.metrics.ptb_tokenizer import tokenize
from internvl.evaluation.metrics.text_scores import levenshtein
from internvl.evaluation.metrics.vqa_scores import CONTRACTIONS, normalize_answer
from internvl.evaluation.metrics.yes_no_scores import read_yes_no
from internvl.evaluation.scores import aggregate, compute_details, score

# metric -> (prediction, references, score)
TEXT_CASES = {
    "exact_match": [("\u00a0Ja\u3000", ["ja"], 1), ("\u200bja", ["ja"], 0), ("STRASSE", ["straße"], 0), ("", [" "], 1)],
    "anls": [
        ("abcq", ["abcd"], 0.75),
        ("abcq     ", ["abcd"], 1 - 1 / 9),
        ("ß", ["ss"], 0),  # 2 edits by the length of SS
        ("abcdß", ["abcdx"], 1 - 1 / 6),
        ("ab", ["xb"], 0.5),
        ("abc", ["xyc"], 0),
        ("", [""], 1),
        ("", ["a"], 0),
        ("b", ["", "b"], 1),
    ],
    "token_f1": [
        ("well-known", ["wellknown"], 1),
        ("the", ["a", "cat"], 0),  # an empty reference is dropped beside another one
        ("the", ["a", "An"], 1),
        ("the cat cat", ["cat cat cat"], 0.8),
        ("anthem", ["them"], 0),
    ],
    "relaxed_accuracy": [
        ("95", ["100"], 1),
        ("105", ["100"], 1),
        ("105.01", ["100"], 0),
        ("0", ["0.0"], 0),
        ("0.0", ["0.0"], 1),
        ("5%", ["0.05"], 1),
        ("5", ["nan"], 0),
        ("NaN", ["NAN"], 0),
        ("-95", ["-100"], 1),
        ("-95", ["100"], 0),
        ("40% ", ["40%"], 1),
        ("40", ["40% "], 0),
        ("%", ["%"], 1),
        ("1e400", ["inf"], 0),
    ],
    "counting": [
        ("..4", ["4"], 1),
        ("TWO", ["2"], 1),
        ("two\nthree", ["2"], 1),
        ("Second.", ["2"], 1),
        ("a.4", ["4"], 0),
    ],
    "wer": [("a b", [""], 2), ("", [""], 0), ("a  b", ["a b"], 0), ("x y", ["a b c d", "x y z"], 1 / 3)],
    "cer": [("a b", [""], 3), ("", [""], 0), ("ab", ["a b"], 1 / 3), (" ab ", ["ab"], 0)],
}


@pytest.mark.parametrize("metric", TEXT_CASES)
def test_rules_of_texts(metric):
    for prediction, references, expected in TEXT_CASES[metric]:
        record = {"prediction": prediction, "references": references}
        assert score(metric, record) == pytest.approx(expected), record


def test_relaxed_accuracy_of_internvl_is_relative_to_the_prediction():
    for prediction, expected in {"95.24": 1, "95.2": 0, "105.26": 1, "105.3": 0}.items():
        record = {"prediction": prediction, "references": ["100"], "scorer": "internvl"}
        assert score("relaxed_accuracy", record) == expected, prediction


def test_levenshtein_of_known_pairs():
    assert levenshtein("kitten", "sitting") == levenshtein("sitting", "kitten") == 3
    assert levenshtein("", "abc") == levenshtein("abc", "") == 3
    assert levenshtein("猫", "🙂") == 1 and levenshtein("\u00e9", "e\u0301") == 2


NORMALIZED_ANSWERS = {
    "Somebody's": "somebody 's",
    "somebody'd": "somebodyd",
    "oclock maam twas yall": "o'clock ma'am 'twas y'all",
    "couldnt've mightn'tve theyd've who'dve": "couldn't've mightn't've they'd've who'd've",
    "yall'll y'allll yall'd've y'alld've y'all'dve": "y'all'll y'all'll y'all'd've y'all'd've y'all'd've",
    "im ive its shes lets id": "im ive its shes lets id",
    "a-b": "b",
    "x-y": "x y",
    "x - y-z": "x yz",  # a mark beside a blank is deleted everywhere
    "c - d": "c d",
    "None of eleven, ten!": "0 of eleven 10",
    "3.5 .5 7. u.s. x.y": "3.5 .5 7 us xy",
    "don't 5:30 #1 50% $2 a&b 2*3": "don't 5:30 #1 50% $2 a&b 2*3",
    "\tAn\n": "",
}


@pytest.mark.parametrize("text", NORMALIZED_ANSWERS)
def test_normalized_answers(text):
    assert normalize_answer(text) == NORMALIZED_ANSWERS[text]


def test_contractions():
    """All words of the evaluator's table, each with its apostrophe."""
    assert len(CONTRACTIONS) == 112
    assert all(word.replace("'", "") == full.replace("'", "") for word, full in CONTRACTIONS.items())
    assert all("'" in full for word, full in CONTRACTIONS.items() if word != "somebody'd")


CHOICES = {"A": "cat", "B": "dog", "C": "red bus", "D": "bird"}
LETTERS = {
    "b": "B",
    "Ｂ": None,
    "Red bus..": "C",
    "the answer is a": "A",
    "the answer is a ": "A",
    "the answer is a cat": "A",  # rule 6: the text
    "The answer is A cat": "A",
    "answer: C answer: B) or so": "B",
    "answer: b) or so, perhaps, who knows it all": None,
    "answer: b).": "B",
    "answer choice b": "B",
    "Answer Is Option (C": "C",
    "答案为：【D】": "D",
    "选项C": "C",
    "选择 b。": "B",
    "ANSWER IS Be": None,
    "ANSWER IS B2": None,
    "ANSWER IS B猫": "B",
    "answer: (b)\nbecause": "B",
    "so it must be D": "D",
    "D it is, said the man to the dog": "D",
    "it is D, said the man to the dog": "B",  # not near the end: the text
    "B and D": None,
    "A dog": "B",
    "(A) dog": "A",
    "A bird, a dog": "A",  # two texts: rule 4
    "A large animal runs on the beach": None,
    "cat dog": None,
    "dogs": "B",
    "dog " * 12: None,  # longer than twice the texts
}


@pytest.mark.parametrize("text", LETTERS)
def test_letters(text):
    assert extract_letter(text, CHOICES) == LETTERS[text]


def test_letters_of_other_choices():
    assert extract_letter("The answer is G.", dict.fromkeys("ABCDEFG", "x")) == "G"
    assert extract_letter("2", {"A": 2, "B": 12}) == "A"
    assert extract_letter("(b)", {"a": "x", "b": "y"}) == "B"
    record = {"prediction": "b", "references": ["C", "B"], "choices": CHOICES}
    assert score("multiple_choice", record) == 1


YES_NO_READINGS = {
    "NO!": "no",
    "yes-no": None,
    "(yes)": "yes",
    "**yes**": None,
    "yes/1,000": None,  # a comma between digits deletes all marks
    "(no) 1,000": "no",
    "no. 5": "no",
    "no.5": None,
    "5.no": None,
    "no,yes": None,
    "Yes...": "yes",
    "no: it is": None,
}


@pytest.mark.parametrize("text", YES_NO_READINGS)
def test_yes_no_readings(text):
    assert read_yes_no(text) == YES_NO_READINGS[text]


def test_yes_no_without_positives_has_no_division_by_zero():
    records = [{"prediction": "no", "references": ["no"]}] * 3
    assert aggregate("yes_no", records) == 1
    assert compute_details("yes_no", records) == {"precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    with pytest.raises(ValueError, match="reference 'perhaps' is neither yes nor no"):
        score("yes_no", {"prediction": "no", "references": ["perhaps"]})


def box_record(prediction: str, reference=(100, 100, 500, 500), width=1000, height=1000) -> dict:
    return {"prediction": prediction, "references": [[*reference]], "width": width, "height": height}


# prediction -> IoU
BOXES = {
    "[1.0, 1.0, 1.0, 0.9]": 0.0,  # below 4: fractions
    "[0.1, 0.1, 0.5, 0.5]": 1.0,
    "a [b] [[100, 100, 500, 500]]": 0.0,
    "[100, 100, [500], 500]": 0.0,
    "[x\n[100, 100, 500, 500]": 1.0,
    "[1, 2, 3\n, 4] [100, 100, 500, 500]": 1.0,  # the first bracket has two commas on its line
    "[ +1e2, 1_00, 500., 0500 ]": 1.0,
    "[100, 100, 1e60, 500]": 0.0,
    "[500, 500, 100, 100]": 0.0,
}


@pytest.mark.parametrize("text", BOXES)
def test_boxes(text):
    record = box_record(text)
    assert compute_details("box_iou", [record])["mean_iou"] == pytest.approx(BOXES[text], abs=1e-6)
    assert score("box_iou", record) == (BOXES[text] >= 0.5)


@pytest.mark.parametrize("unit", ["[", "[,", "0, ", "[0, "])
def test_degenerate_answers_take_linear_time(unit):
    """A model at the start of training repeats itself up to the limit of tokens."""
    start = time.process_time()
    assert score("box_iou", box_record(unit * 5000)) == 0
    assert time.process_time() - start < 1


def test_box_iou_of_exactly_one_half_counts():
    for width, height in ((1000, 1000), (640, 480), (333, 777), (1920, 1080)):
        reference = [0.1 * width, 0.1 * height, 0.5 * width, 0.5 * height]
        assert score("box_iou", box_record("[100, 100, 300, 500]", reference, width, height)) == 1


def test_counts():
    texts = {
        "-4": "4",
        "4,000": "4",
        "four dogs": None,
        "twelve": None,
        "tenth ": "10",
        "four \n5": None,
        "四": None,
        "٣": "٣",
        "": None,
    }
    assert {text: parse_count(text) for text in texts} == texts


def test_numbers():
    def score_number(prediction, reference, answer_type="integer", precision=None):
        record = {"prediction": prediction, "references": [reference], "answer_type": answer_type}
        return score("number", record | {"precision": precision})

    assert score_number("Answer:\n\n 18.9 \nFinal answer: 3", "18") == 1
    assert score_number("my final ANSWER: -0.5", "0") == 1
    assert score_number("12345678901234567890", "12345678901234567168") == 1  # as a double
    assert score_number("1e400", "inf") == 0
    assert score_number("inf", "inf", "float", 1) == 1
    assert score_number("2.5", "2.0", "float", 0) == 1  # half to even
    assert score_number("3", "3.0", "float", 2.0) == 1
    assert score_number("0.50", "0.50", "float", 2) == 0  # read as 0.5


# -- captions ----------------------------------------------------------------------------------------------------------


def test_tokens_equal_those_of_corenlp():
    """2,094 captions and words with their recorded tokens; 13 rare forms differ, such as HTML entities."""
    captions = read_lines("ptb_tokens")
    different = [c["text"] for c in captions if " ".join(tokenize_caption(c["text"])).split() != c["tokens"].split()]
    assert len(captions) == 2094
    assert len(different) <= 13, different


def test_tokens():
    assert tokenize("“I can't,” he said (in Dr. Lee's 2-year-old car).") == (
        "'' i ca n't , '' he said -lrb- in dr. lee 's 2-year-old car -rrb- .".split()
    )
    assert tokenize("\r\n \u2028") == [] == tokenize("")
    assert tokenize("a\U0001d41ab\u00adc") == ["a", "bc"]
    assert tokenize_caption("Gimme 50% of $5,000 \U0001f642 – wow!!") == "gim me 50 % of $ 5,000 wow !!".split()
