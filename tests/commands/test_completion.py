"""Completion in a shell."""

import os
import subprocess
import sys

import pytest
from helpers.paths import PACKAGE_DIR

from internvl.commands.completion import read_tool_flags
from internvl.commands.table import COMMANDS, CONVERSIONS
from internvl.recipes import list_recipes

pytest.importorskip("argcomplete")
pytestmark = pytest.mark.multiprocess


@pytest.fixture
def complete(tmp_path):
    """Return a function that completes a line as a shell does, in an empty folder."""

    def run(line: str) -> set[str]:
        answers = tmp_path / "answers"
        variables = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answers), "_ARGCOMPLETE_IFS": "\n"}
        variables |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
        env = os.environ | {"PYTHONPATH": str(PACKAGE_DIR)} | variables
        subprocess.run([sys.executable, "-m", "internvl"], cwd=tmp_path, env=env, check=True)
        return {answer.strip() for answer in answers.read_text().splitlines()}

    return run


def test_commands(complete):
    assert {*COMMANDS} <= complete("internvl ")
    assert complete("internvl ch") == {"check-data", "chat"}
    assert {*CONVERSIONS} <= complete("internvl convert ")


def test_recipes_and_flags(complete):
    assert {*list_recipes()} <= complete("internvl train ")
    assert complete("internvl plan internvl2.5/8b_vit") == {"internvl2.5/8b_vit_lora"}
    assert {"--use_llm_lora", "--use_llm"} & complete("internvl train --use_llm") == {"--use_llm_lora"}
    assert {"--learning_rate", "--config", "--nproc"} <= complete("internvl train 8b_vit_lora --")
    assert "--combination" in complete("internvl merge --")


def test_files(complete, tmp_path):
    (tmp_path / "run.yaml").touch()
    assert complete("internvl train --config ru") == {"run.yaml"}


def test_flags_of_a_tool_are_those_of_its_parser():
    assert {"--adapter", "--dtype", "--weight"} <= {*read_tool_flags("internvl.tools.merge_lora")}
