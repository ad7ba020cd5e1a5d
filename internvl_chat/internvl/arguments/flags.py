"""Declare, check and parse command-line flags.

Every field of the dataclasses in this folder is a flag, declared by `option`.
"""

from collections.abc import Collection, Mapping
from dataclasses import field, fields

from transformers import HfArgumentParser

from internvl.nearest_name import suggest


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


def describe_unknown_words(
    unknown: list[str], argv: list[str], known: Collection[str], hints: Mapping[str, str]
) -> str:
    """Describe the words of a command line that belong to no flag.

    Args:
        unknown: what argparse has left, in the order of `argv`.
        known: names of all flags.
        hints: flag -> what to do instead.
    """
    flags = [word for word in unknown if is_flag(word)]
    if flags:
        names = [flag.lstrip("-").split("=")[0] for flag in flags]
        name = next((name for name in names if name in hints), names[0])
        return f"unknown flag: {' '.join(unknown)}{advise_unknown_flag(name, known, hints)}"
    # The value of a flag may be the same word.
    takes_next = [is_flag(word) and "=" not in word for word in ["", *argv]]
    place = next(i for i, word in enumerate(argv) if word == unknown[0] and not takes_next[i])
    start = max((i for i in range(place) if is_flag(argv[i])), default=place)
    given = " ".join(argv[start : place + 1])
    return f"{given}: {unknown[0]} belongs to no flag; a flag takes one value, and a list has commas: A,B."


def advise_unknown_flag(name: str, known: Collection[str], hints: Mapping[str, str]) -> str:
    """Return the end of a message about an unknown flag."""
    return f"; {hints[name]}." if name in hints else suggest(name, known, "--") or "; --help lists all flags."


def is_flag(word: str) -> bool:
    """Return whether a word of a command line is a flag, not a value such as -3."""
    return word.startswith("-") and not word[1:2].isdigit()


class OneLineErrorParser(HfArgumentParser):
    """A parser that raises errors instead of printing its usage and exiting.

    Flags are not abbreviated: shell/launch.sh reads some of them, too.
    """

    def __init__(self, classes: tuple[type, ...]):
        epilog = "--config FILE stands for the flags of a YAML file, such as run.yaml of an output folder."
        super().__init__(classes, allow_abbrev=False, epilog=epilog)

    @property
    def flag_names(self) -> list[str]:
        """Names of all flags, without dashes."""
        return [field.name for cls in self.dataclass_types for field in fields(cls) if field.init]

    def error(self, message: str):
        raise ValueError(f"{message.rstrip('.')}.")
