"""Completion of commands, recipes and flags in a shell, by argcomplete.

eval "$(register-python-argcomplete internvl)"      in ~/.bashrc
"""

import argparse
import importlib.util
import os
import re
from pathlib import Path

from internvl.commands.table import COMMANDS, CONVERSIONS, Command
from internvl.commands.training_flags import TRAIN_FLAGS, list_flags, read_flag_help
from internvl.recipes import list_recipes

RECIPE_COMMANDS = ("train", "plan")
TRAINING_FLAG_COMMANDS = ("train", "plan", "check-data")


def complete() -> None:
    """Print the completions that the shell asks for, and exit.

    Without argcomplete there are none.
    """
    if importlib.util.find_spec("argcomplete"):
        import argcomplete

        argcomplete.autocomplete(build_parser(os.environ.get("COMP_LINE", "").split()[1:]))


def build_parser(words: list[str]) -> argparse.ArgumentParser:
    """Build a parser with all commands, and the typed one's flags."""
    parser = argparse.ArgumentParser(prog="internvl")
    parser.add_argument("--version", action="store_true")
    add_commands(parser, COMMANDS, words)
    return parser


def add_commands(parser: argparse.ArgumentParser, commands: dict[str, Command], words: list[str]) -> None:
    """Add one parser per command."""
    subparsers = parser.add_subparsers()
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=command.summary)
        if name == "convert":
            add_commands(subparser, CONVERSIONS, words[1:])
        elif words[:1] == [name]:
            add_flags(subparser, name, command)


def add_flags(parser: argparse.ArgumentParser, name: str, command: Command) -> None:
    """Add the flags of a command, and its arguments, which are recipes or files."""
    arguments = parser.add_argument("arguments", nargs="*")
    if name in RECIPE_COMMANDS:
        arguments.completer = lambda prefix, **_: list_recipes()  # type: ignore[missing-attribute]
    flags = dict.fromkeys(TRAIN_FLAGS if name == "train" else read_tool_flags(command.module), "")
    if name in TRAINING_FLAG_COMMANDS:
        flags |= {f"--{flag}": read_flag_help().get(flag, "") for flag in sorted(list_flags())}
    for flag, description in flags.items():
        parser.add_argument(flag, help=description.replace("%", "%%"))


def read_tool_flags(module: str) -> list[str]:
    """Read the flags that a tool adds to its parser, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return []
    return re.findall(r'add_argument\(\s*"(--[\w-]+)"', Path(spec.origin).read_text(encoding="utf-8"))
