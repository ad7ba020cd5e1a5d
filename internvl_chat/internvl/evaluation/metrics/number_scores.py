"""Scores of numbers: relaxed_accuracy, counting, number."""

import re

from internvl.constants import shorten

RELAXED_TOLERANCE = 0.05
CARDINALS = "zero one two three four five six seven eight nine ten".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
COUNT_WORDS = {word: str(n) for n, word in enumerate(CARDINALS)} | {word: str(n + 1) for n, word in enumerate(ORDINALS)}
ANSWER_MARK = re.compile(r"(?:final answer|answer):\s*(.*)", re.IGNORECASE)
ANSWER_TYPES = ("integer", "float")


def score_relaxed_accuracy(record: dict, relative_to: str = "reference") -> float:
    """Compare numbers with a tolerance of 5 %, and other texts in lower case.

    Args:
        relative_to: "reference", as in ChartQA (Masry et al. 2022), or "prediction", as in InternVL's evaluation.
    """
    prediction = record["prediction"].strip()
    return float(any(_is_near(prediction, reference, relative_to) for reference in record["references"]))


def _is_near(prediction: str, reference: str, relative_to: str) -> bool:
    predicted, expected = parse_percentage(prediction), parse_percentage(reference)
    base = expected if relative_to == "reference" else predicted
    if predicted is not None and expected is not None and base:
        return abs(expected - predicted) / abs(base) <= RELAXED_TOLERANCE
    return prediction.lower() == reference.lower()


def parse_percentage(text: str) -> float | None:
    """Parse a number; a text that ends with % is a hundredth. None: it is not a number."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def score_counting(record: dict) -> float:
    """Compare a count: the first digits of the first line or sentence, or one number word."""
    return float(parse_count(record["prediction"]) in {reference.lower() for reference in record["references"]})


def parse_count(text: str) -> str | None:
    """Return the count in an answer, None if there is none."""
    text = text.strip()
    end = text.find("\n")
    if end <= 0:
        end = text.find(".")
    if end > 0:
        text = text[:end]
    digits = re.search(r"\d+", text)
    return digits[0] if digits else COUNT_WORDS.get(text.lower())


def find_count_error(record: dict) -> str | None:
    """Return which reference is not a count."""
    wrong = [text for text in record["references"] if not (isinstance(text, str) and re.fullmatch(r"\d+", text))]
    return f"reference {shorten(wrong[0])} is not a text of digits" if wrong else None


def score_number(record: dict) -> float:
    """Compare a number, as text in the form that Python prints.

    A reference must have this form, too: "0.5", not "0.50". `answer_type` is "integer" (decimals are cut) or "float"
    (rounded to `precision` decimals).
    """
    number = format_number(extract_number(record["prediction"]), record["answer_type"], record.get("precision"))
    return float(number in record["references"])


def extract_number(text: str) -> str:
    """Return what follows "Answer:" up to the end of its line, else the whole text."""
    marked = ANSWER_MARK.search(text)
    return marked[1].strip() if marked else text


def format_number(text: str, answer_type: str, precision: float | None) -> str | None:
    """Return the number as Python prints it; None if the text is not a number."""
    try:
        if answer_type == "integer":
            return str(int(float(text)))
        return str(round(float(text), int(precision or 0)))
    except (ValueError, OverflowError):  # int() of NaN and of infinity
        return None


def find_number_type_error(record: dict) -> str | None:
    """Return what is wrong with answer_type, precision or the types of references."""
    answer_type, precision = record["answer_type"], record.get("precision")
    if answer_type not in ANSWER_TYPES:
        return f"answer_type {shorten(answer_type)} is invalid: expected 'integer' or 'float'"
    if answer_type == "float" and not _is_count(precision):
        return f"precision {shorten(precision)} is invalid: expected the number of decimals"
    wrong = [reference for reference in record["references"] if not isinstance(reference, str)]
    return f"reference {shorten(wrong[0])} is not the text of a number" if wrong else None


def _is_count(value: object) -> bool:
    """Return whether a value is a whole number from 0; MathVista writes 1.0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and value >= 0 and value % 1 == 0


def find_number_error(record: dict) -> str | None:
    """Return what is wrong with a record; a reference that no answer can match is wrong, too."""
    if error := find_number_type_error(record):
        return error
    for reference in record["references"]:
        number = format_number(reference, record["answer_type"], record.get("precision"))
        if number is None:
            return f"reference {shorten(reference)} is not the text of a number"
        if number != reference:
            return f"reference {shorten(reference)} matches no answer: write it as {number!r}"
    return None
