"""Score of multiple-choice questions: multiple_choice.

Public evaluations read the same answers differently, and some pick a random letter where they find none. These rules
are a union of what they read. Where they find no letter, the answer is wrong.
"""

import re

from internvl.constants import shorten

OPENING, CLOSING = re.escape("(\"'[*<$（【「“‘"), re.escape(")\"']*>$）】」”’")
SEPARATORS = {ord(mark): " " for mark in ".()[],:;!*#{}"}
NEAR_END = 4  # tokens


def score_multiple_choice(record: dict) -> float:
    """Compare the letter of the chosen option; `choices` is a dict of letter -> text."""
    letter, choices = extract_letter(record["prediction"], record["choices"]), record["choices"]
    # A reference is a letter, or an answer such as "B. glass tower".
    return float(letter is not None and any(letter == extract_letter(text, choices) for text in record["references"]))


def extract_letter(text: str, choices: dict) -> str | None:
    """Return the letter of the chosen option, None if the answer has none. The first rule that finds one counts."""
    text = text.strip()
    options = {str(letter).upper(): str(option).strip().lower() for letter, option in choices.items()}
    is_article = _starts_with_article(text)
    rules = [_find_only_letter, _find_option, _find_statement]
    rules += [_find_contained_option, _find_letter_near_end] if is_article else []
    rules += [] if is_article else [_find_letter_near_end, _find_letter_at_start, _find_contained_option]
    return next((letter for rule in rules if (letter := rule(text, options))), None)


def _starts_with_article(text: str) -> bool:
    """Return whether the first token is A, with more text after white space: "A dog"."""
    return text.translate(SEPARATORS).split()[:1] == ["A"] and bool(re.match(r"[^A]*A\s+\S", text))


def _find_only_letter(text: str, options: dict[str, str]) -> str | None:
    characters = [character for character in text if character.isalnum()]
    letter = characters[0].upper() if len(characters) == 1 else None
    return letter if letter in options else None


def _find_option(text: str, options: dict[str, str]) -> str | None:
    def trim(text: str) -> str:
        return text.rstrip(".").strip()

    return _get_only([letter for letter, option in options.items() if trim(option) == trim(text.lower())])


def _find_statement(text: str, options: dict[str, str]) -> str | None:
    """Return the last letter that follows "answer is" or a similar phrase."""
    upper = "".join(map(re.escape, options))
    lower = "".join(map(re.escape, map(str.lower, options)))
    pattern = (
        r"(?:(?i:answer(?:\s+is)?)|答案[是为]?|选[择项]?)\s*[:：]?\s*(?:(?i:option|choice)\s*)?"
        rf"[{OPENING}]*"
        rf"([{upper}](?![a-zA-Z0-9])|[{lower}](?=[{CLOSING}]*(?:\s*\Z|[\n.,;:!?。，；：！？])))"
    )
    found = re.findall(pattern, text)
    return found[-1].upper() if found else None


def _find_letter_near_end(text: str, options: dict[str, str]) -> str | None:
    tokens = text.translate(SEPARATORS).split()
    letter = _get_only(options.keys() & tokens)
    return letter if letter and tokens.index(letter) >= len(tokens) - NEAR_END else None


def _find_letter_at_start(text: str, options: dict[str, str]) -> str | None:
    tokens = text.translate(SEPARATORS).split()
    letter = _get_only(options.keys() & tokens)
    return letter if letter and tokens[0] == letter else None


def _find_contained_option(text: str, options: dict[str, str]) -> str | None:
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    return _get_only([letter for letter, option in options.items() if option in text.lower()])


def _get_only(found) -> str | None:
    return next(iter(found)) if len(found) == 1 else None


def find_choice_error(record: dict) -> str | None:
    """Return what is wrong with choices or references."""
    choices = record["choices"]
    if not isinstance(choices, dict) or not choices or any(len(str(letter)) != 1 for letter in choices):
        return f"choices {shorten(choices)} are invalid: expected an object of letter -> text"
    for reference in record["references"]:
        if not isinstance(reference, str) or extract_letter(reference, choices) is None:
            return f"reference {shorten(reference)} is not one of the choices {', '.join(map(str, choices))}"
    return None
