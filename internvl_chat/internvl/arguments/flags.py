"""Declare, check and parse command-line flags.

Every field of the dataclasses in this folder is a flag, declared by `option`.
"""

from collections.abc import Mapping
from dataclasses import field

from transformers import HfArgumentParser


def option(default, help: str):
    """Declare a flag: a dataclass field with default and help text."""
    return field(default=default, metadata={"help": help})


def require(args, flag: str, is_valid: bool, expected: str) -> None:
    """Raise a ValueError unless the value of a flag is valid.

    Args:
        args: the dataclass that the flag is a field of.
        expected: the valid values in words, such as "an integer >= 1".
    """
    if not is_valid:
        value = getattr(args, flag)
        raise ValueError(f"--{flag} {repr(value) if value == '' else value} is invalid: expected {expected}.")


def describe_unknown_words(unknown: list[str], argv: list[str], hints: Mapping[str, str]) -> str:
    """Describe the words of a command line that belong to no flag.

    Args:
        unknown: what argparse has left, in the order of `argv`.
        hints: flag -> what to do instead.
    """
    flags = [word for word in unknown if is_flag(word)]
    if flags:
        names = [flag.lstrip("-").split("=")[0] for flag in flags]
        advice = "".join(f"; {hints[name]}" for name in names if name in hints)
        return f"unknown flag: {' '.join(unknown)}{advice or '; --help lists all flags'}."
    # The value of a flag may be the same word.
    takes_next = [is_flag(word) and "=" not in word for word in ["", *argv]]
    place = next(i for i, word in enumerate(argv) if word == unknown[0] and not takes_next[i])
    start = max((i for i in range(place) if is_flag(argv[i])), default=place)
    given = " ".join(argv[start : place + 1])
    return f"{given}: {unknown[0]} belongs to no flag; a flag takes one value, and a list has commas: A,B."


def is_flag(word: str) -> bool:
    """Return whether a word of a command line is a flag, not a value such as -3."""
    return word.startswith("-") and not word[1:2].isdigit()


class OneLineErrorParser(HfArgumentParser):
    """A parser that raises errors instead of printing its usage and exiting."""

    def error(self, message: str):
        raise ValueError(f"{message}.")
