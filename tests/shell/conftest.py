"""Fixtures that run shell scripts in a clean environment with this Python."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import TRAIN_DIR

from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.arguments.training import FINETUNE_ARGUMENTS, parse_args


@pytest.fixture(scope="session")
def commands_dir(tmp_path_factory) -> Path:
    """Make a folder of this machine's commands, without SLURM's and GPUs'."""
    folder = tmp_path_factory.mktemp("commands")
    for directory in map(Path, os.environ["PATH"].split(os.pathsep)):
        for command in directory.iterdir() if directory.is_dir() else []:
            link = folder / command.name
            if command.name not in ("srun", "scontrol", "nvidia-smi") and not link.is_symlink():
                link.symlink_to(command)
    return folder


@pytest.fixture
def bash(tmp_path, commands_dir):
    """Return `run(script, *flags, NAME=value, ...)`.

    It runs in an empty folder, with only the named variables set.
    """

    def run(script, *flags, cwd=tmp_path, shell="/bin/bash", **variables):
        env = {"PATH": f"{sys.prefix}/bin:{commands_dir}", "HOME": str(tmp_path), "INTERNVL_VENV": "none"}
        env |= {name: str(value) for name, value in variables.items()}
        command = [shell, str(script), *map(str, flags)]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    return run


@pytest.fixture
def dry_run(bash):
    """Return a function like `bash` that runs a recipe with DRY_RUN=1.

    It returns the words of the printed command: those up to the entry point, and the flags after it.
    """

    def run(script, *flags, **variables):
        done = bash(script, *flags, DRY_RUN=1, **variables)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        words = shlex.split(done.stdout)
        num_start_words = 1 + next(i for i, word in enumerate(words) if Path(word).parent == TRAIN_DIR)
        return words[:num_start_words], words[num_start_words:]

    return run


@pytest.fixture
def parse_recipe(dry_run):
    """Return a function like `dry_run` that also parses the flags into dataclasses."""

    def run(*args, **variables):
        start, argv = dry_run(*args, **variables)
        return parse_args(argv, PREFERENCE_ARGUMENTS if start[-1].endswith("mpo.py") else FINETUNE_ARGUMENTS)

    return run
