"""Names and descriptions of the flags of training, read from the source code.

To import the dataclasses takes seconds, because their base class is transformers'.
"""

import ast
import importlib.util
import re
import shutil
import textwrap
from functools import cache
from importlib.resources import files
from pathlib import Path

from internvl.arguments.topics import FIRST_FLAGS, TITLES, TOPICS, TRANSFORMERS_FLAGS
from internvl.arguments.unsupported_flags import REMOVED_FLAGS
from internvl.nearest_name import suggest

TRAIN_FLAGS = ("--list", "--config", "--nproc", "--dry-run", "--preference")  # of `internvl train` itself
HELP_COLUMN = 32  # of the descriptions


@cache
def read_flag_help() -> dict[str, str]:
    """Read the description of every flag that the package declares with `option`."""
    helps = {}
    for file in (files("internvl") / "arguments").iterdir():
        source = file.read_text(encoding="utf-8") if file.name.endswith(".py") else ""
        for node in ast.walk(ast.parse(source)) if "= option(" in source else ():
            match node:
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.Call(args=[_, description, *_])):
                    helps[name] = ast.literal_eval(description)
    return helps


@cache
def list_flags() -> set[str]:
    """List the names of all flags of training, those of the installed transformers included."""
    spec = importlib.util.find_spec("transformers")
    inherited = []
    if spec and spec.origin:
        source = Path(spec.origin).with_name("training_args.py").read_text(encoding="utf-8")
        inherited = re.findall(r"^    (\w+): ", source, re.MULTILINE)
    return {*read_flag_help(), *inherited}


def describe_unknown_flag(name: str) -> str:
    """Return the end of a message about an unknown flag of training.

    It is empty for flags that exist. The parser takes dashes, and `no_` before a flag whose default is True.
    """
    name = name.replace("-", "_")
    if {name, name.removeprefix("no_")} & {*list_flags(), *REMOVED_FLAGS}:
        return ""
    names = list_flags() | {flag.removeprefix("--") for flag in TRAIN_FLAGS}
    return suggest(name, names, "--") or "; `internvl train --help` lists all flags."


def format_flags() -> str:
    """Format all flags: those that matter first, then one section per topic."""
    helps = TRANSFORMERS_FLAGS | read_flag_help()
    sections = {"the flags that matter first": FIRST_FLAGS}
    sections |= {TITLES[topic]: names.split() for topic, names in TOPICS.items()}
    sections["of transformers; its documentation has the others"] = list(TRANSFORMERS_FLAGS)
    shown, lines = set(), []
    for title, names in sections.items():
        lines += ["", f"{title}:", *(format_flag(name, helps[name]) for name in names if name not in shown)]
        shown |= {*names}
    return "\n".join(lines[1:])


def format_flag(name: str, description: str) -> str:
    """Format a flag and its description as argparse does."""
    indent = " " * HELP_COLUMN
    width = max(shutil.get_terminal_size().columns - 2, HELP_COLUMN + 20)
    text = textwrap.fill(description, width, initial_indent=indent, subsequent_indent=indent)
    start = f"  --{name}"
    return start + text[len(start) :] if len(start) < HELP_COLUMN - 1 else f"{start}\n{text}"
