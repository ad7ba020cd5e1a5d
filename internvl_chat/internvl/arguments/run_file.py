"""Flags in a YAML file: `--config FILE` on a command line, `run.yaml` in every output folder.

    learning_rate: 1e-4
    report_to: [tensorboard, wandb]

A value is the text that follows the flag on a command line, so `no` is a strategy and `010` a name: the flag decides,
not YAML. No torch here: `internvl` and shell/launch.sh read such files before they start ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import yaml

from internvl.regular_files import open_regular_file

CONFIG_FLAG = "--config"
RUN_CONFIG_FILE = "run.yaml"  # in the output folder
MAX_RUN_FILE_BYTES = 2**16
TAG = "tag:yaml.org,2002:"
# What YAML makes of a text. Other tags are null, `!!binary` and `!!python/...`.
TEXT_TAGS = {TAG + kind for kind in ("str", "int", "float", "bool", "timestamp", "value", "merge")}
PLAIN_TAGS = {TAG + kind for kind in ("int", "float")}  # written without quotes


class RunFlag(NamedTuple):
    """Value of a flag in a file, and its line."""

    value: str | list[str]
    line: int


def read_run_file(path: str) -> dict[str, RunFlag]:
    """Read the flags of a YAML file. Names are not checked.

    Raises:
        ValueError: the file cannot be read, or is not a mapping of names to texts or lists of texts.
    """
    root = _compose(path)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} is invalid: expected `flag: value` in each line.")
    flags: dict[str, RunFlag] = {}
    for key, node in root.value:
        name, value, line = key.value, _read_value(node), key.start_mark.line + 1
        if not _is_text(key):
            raise ValueError(f"{path}, line {line}: expected the name of a flag.")
        if name in flags:
            raise ValueError(f"{path}, line {line}: {name!r:.80} is already given in line {flags[name].line}.")
        if value is None:
            raise ValueError(f"{path}, line {line}: {name!r:.80} needs a value: a text, a number or a list of them.")
        flags[name] = RunFlag(value, line)
    return flags


def _compose(path: str) -> yaml.Node | None:
    """Parse YAML into nodes, which have lines and texts; no object is constructed."""
    try:
        with open_regular_file(path, MAX_RUN_FILE_BYTES) as file:
            content = file.read()
    except OSError as error:
        raise ValueError(f"{CONFIG_FLAG} {path} cannot be read: {error.strerror or error}.") from error
    text = content.decode("utf-8-sig", errors="replace")
    try:
        content.decode()
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        line, problem = content[: error.start].count(b"\n") + 1, "expected text in UTF-8"
    except yaml.reader.ReaderError as error:
        line, problem = text[: error.position].count("\n") + 1, f"unexpected character {error.character!r}"
    except yaml.MarkedYAMLError as error:
        assert error.problem_mark is not None
        line, problem = error.problem_mark.line + 1, ", ".join(filter(None, [error.context, error.problem]))
    except (RecursionError, ValueError, OverflowError) as error:  # the latter: "\Uffffffff"
        line, problem = 1, str(error)
    raise ValueError(f"{path}, line {line}: invalid YAML: {problem}.")


def _read_value(node: yaml.Node) -> str | list[str] | None:
    """Return the text or the texts of a node; None if it has another type."""
    if isinstance(node, yaml.SequenceNode):
        texts = [item.value for item in node.value if _is_text(item)]
        return texts if texts and len(texts) == len(node.value) else None
    return node.value if _is_text(node) else None


def _is_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag in TEXT_TAGS and "\0" not in node.value


def is_json_file(argv: Sequence[str]) -> bool:
    """Return whether a command line is upstream's: one `.json` file of all arguments."""
    return len(argv) == 1 and argv[0].endswith(".json")


def expand_run_files(
    argv: Sequence[str], to_words_fn: Callable[[str, str, RunFlag], list[str]] | None = None
) -> list[str]:
    """Replace each `--config FILE` by the flags of the file.

    So flags after it override those of the file.

    Args:
        to_words_fn: converts (path, name, flag) to words of a command line; by default to `--name=value`.

    Raises:
        ValueError: a file is invalid.
    """
    words, rest = [], iter(argv)
    for word in rest:
        flag, equals, path = word.partition("=")
        if flag != CONFIG_FLAG:
            words.append(word)
            continue
        path = path if equals else next(rest, "")
        if not path or path.startswith("--"):
            raise ValueError(f"{CONFIG_FLAG} requires a file of flags, such as {RUN_CONFIG_FILE}.")
        for name, given in read_run_file(path).items():
            words += to_words_fn(path, name, given) if to_words_fn else [format_flag(name, given.value)]
    return words


def format_flag(name: str, value: str | list[str]) -> str:
    """Format a flag as one word of a command line; a list gets commas."""
    return f"--{name}={value if isinstance(value, str) else ','.join(value)}"


def format_run_file(flags: Mapping[str, str | list[str]], header: list[str]) -> str:
    """Format flags as YAML that `read_run_file` reads back.

    Args:
        header: lines of the comment above them.
    """
    entries = [
        (_make_scalar(name), _make_scalar(value) if isinstance(value, str) else _make_list(value))
        for name, value in flags.items()
    ]
    root = yaml.MappingNode(TAG + "map", entries, flow_style=False)
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header)
    return comment + yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True, width=2**20)


def _make_list(texts: list[str]) -> yaml.Node:
    return yaml.SequenceNode(TAG + "seq", [_make_scalar(text) for text in texts], flow_style=True)


def _make_scalar(text: str) -> yaml.Node:
    """Make a number or True without quotes, and a text that other readers of YAML read as a text."""
    tag = yaml.resolver.Resolver().resolve(yaml.ScalarNode, text, (True, False))
    is_plain = tag in PLAIN_TAGS or text in ("True", "False")
    style = None if text.isprintable() else '"'  # with escapes: YAML changes line breaks such as \x85
    return yaml.ScalarNode(tag if is_plain else TAG + "str", text, style=style)
