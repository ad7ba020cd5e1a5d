"""Declare, check and parse command-line flags.

Every field of the dataclasses in this folder is a flag, declared by `option`.
"""

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
        raise ValueError(f"--{flag} {getattr(args, flag)} is invalid: expected {expected}.")


class OneLineErrorParser(HfArgumentParser):
    """A parser that raises errors instead of printing its usage and exiting."""

    def error(self, message: str):
        raise ValueError(f"{message}.")
