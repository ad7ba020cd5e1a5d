"""Runs shell scripts in a clean environment of the interpreter that runs the tests."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.arguments.training import FINETUNE_ARGUMENTS, parse_args

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = ROOT / "internvl_chat/internvl/train"


@pytest.fixture(scope="session")
def plain_machine(tmp_path_factory) -> Path:
    """A folder of this machine's commands, less those of SLURM and of GPUs: the tests mean a machine without either."""
    folder = tmp_path_factory.mktemp("commands")
    for directory in map(Path, os.environ["PATH"].split(os.pathsep)):
        for command in directory.iterdir() if directory.is_dir() else []:
            link = folder / command.name
            if command.name not in ("srun", "scontrol", "nvidia-smi") and not link.is_symlink():
                link.symlink_to(command)
    return folder


@pytest.fixture
def bash(tmp_path, plain_machine):
    """`bash(script, *flags, NAME=value, ...)`: run it in an empty folder with only the named variables set."""

    def run(script, *flags, cwd=tmp_path, shell="/bin/bash", **variables):
        env = {"PATH": f"{sys.prefix}/bin:{plain_machine}", "HOME": str(tmp_path), "INTERNVL_VENV": "none"}
        env |= {name: str(value) for name, value in variables.items()}
        command = [shell, str(script), *map(str, flags)]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    return run


@pytest.fixture
def dry_run(bash):
    """Like `bash` with DRY_RUN=1; returns the words of the command that would start: up to the entry, and behind it."""

    def run(script, *flags, **variables):
        done = bash(script, *flags, DRY_RUN=1, **variables)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        words = shlex.split(done.stdout)
        cut = 1 + next(i for i, word in enumerate(words) if Path(word).parent == ENTRIES)
        return words[:cut], words[cut:]

    return run


@pytest.fixture
def parsed(dry_run):
    """The three dataclasses that the training would parse from a recipe."""

    def run(*args, **variables):
        start, argv = dry_run(*args, **variables)
        return parse_args(argv, PREFERENCE_ARGUMENTS if start[-1].endswith("mpo.py") else FINETUNE_ARGUMENTS)

    return run
