"""Errors of the command-line tools name the nearest flag."""

import pytest

from internvl.nearest_name import suggest
from internvl.tool_parser import ToolParser


@pytest.fixture
def parser():
    parser = ToolParser("Do something.\n\n    do IN [--max_length N]\n")
    parser.add_argument("input")
    parser.add_argument("--max_length", type=int)
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("in --max_lenght 3", "unrecognized arguments: --max_lenght 3; did you mean --max_length?"),
        ("in --max_lenght=3", "unrecognized arguments: --max_lenght=3; did you mean --max_length?"),
        ("in --zzz", "unrecognized arguments: --zzz"),
        ("in out", "unrecognized arguments: out"),
    ],
)
def test_an_unknown_flag_names_the_nearest(parser, capsys, words, message):
    with pytest.raises(SystemExit) as error:
        parser.parse_args(words.split())
    assert error.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


def test_known_flags_and_their_beginnings(parser):
    assert parser.parse_args(["in", "--max_len", "3"]).max_length == 3


def test_the_docstring_keeps_its_lines(parser):
    assert "\n    do IN [--max_length N]\n" in parser.format_help()


def test_nearest_name():
    assert suggest("lerning_rate", ["beta", "learning_rate"]) == "; did you mean learning_rate?"
    assert suggest("bata", ["beta"], "--") == "; did you mean --beta?"
    assert suggest("zzz", ["beta"], "--") == ""
