"""Flags that are read from the source code are those of the parser."""

from dataclasses import fields

import transformers

from internvl.arguments.flags import OneLineErrorParser
from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.arguments.topics import FIRST_FLAGS, TITLES, TOPICS, TRANSFORMERS_FLAGS
from internvl.arguments.unsupported_flags import REMOVED_FLAGS
from internvl.commands.training_flags import describe_unknown_flag, list_flags, read_flag_help


def get_parser_flags() -> dict[str, str]:
    """Return the flags of the parser, with their descriptions."""
    return {field.name: field.metadata.get("help", "") for cls in PREFERENCE_ARGUMENTS for field in fields(cls)}


def test_names_are_those_of_the_parser():
    parsed = {field.name for cls in PREFERENCE_ARGUMENTS for field in fields(cls) if field.init}
    assert parsed <= list_flags()
    assert list_flags() - parsed <= {field.name for field in fields(transformers.TrainingArguments)}


def test_descriptions_are_those_of_the_parser():
    descriptions = get_parser_flags()
    assert len(read_flag_help()) > 100
    assert {name: descriptions[name] for name in read_flag_help()} == read_flag_help()


def test_topics_name_existing_flags():
    assert TITLES.keys() == TOPICS.keys()
    assert {*TRANSFORMERS_FLAGS} <= {field.name for field in fields(transformers.TrainingArguments)}
    assert len(FIRST_FLAGS) == 8 and {*FIRST_FLAGS} <= list_flags()


def test_whatever_the_parser_takes_is_known():
    """It takes dashes, and `--no_NAME` for a flag whose default is True, but no beginnings of names."""
    actions = OneLineErrorParser(PREFERENCE_ARGUMENTS)._actions
    words = {word for action in actions for word in action.option_strings if word.startswith("--")}
    assert len(words) > 250
    for word in words - {"--help"}:
        assert not describe_unknown_flag(word.removeprefix("--")), word
    for name in ("learning-rate", *REMOVED_FLAGS):
        assert not describe_unknown_flag(name)
    assert describe_unknown_flag("use_packed") == "; did you mean --use_packed_ds?"
    assert describe_unknown_flag("learning_rat3") == "; did you mean --learning_rate?"
