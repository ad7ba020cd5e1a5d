"""What a machine lacks is one sentence, from the recipe and from a program that is started directly."""

import os
import re
import subprocess
import sys

import pytest
from helpers.paths import VISION_LORA_RECIPE
from helpers.training_runs import TRAIN_ADAPTERS, ZERO_FLAGS, build_launch_command

pytestmark = pytest.mark.multiprocess
ZERO_2 = ZERO_FLAGS["zero2"]
# name -> flags, shell commands before the program, error
LACKS = {
    "compiler": (
        ZERO_2,
        "export CXX=no-such-compiler",
        "DeepSpeed compiles an op, and the C\\+\\+ compiler no-such-compiler is",
    ),
    "working compiler": (
        ZERO_2,
        "export CXX=/bin/false TORCH_EXTENSIONS_DIR=$PWD/new",
        ".* set CXX to a C\\+\\+ compiler .*",
    ),
    "home": (
        ZERO_2,
        "export HOME=/proc/none",
        "DeepSpeed compiles an op into /proc/none/.* set HOME or TORCH_EXTENSIONS_DIR",
    ),
    "cache": ([], "export HOME=/proc/none; unset INTERNVL_CACHE", "the cache /proc/none/.* set INTERNVL_CACHE to a"),
    "memory": ([], "ulimit -v 2000000", "`ulimit -v` 2000000 is too low"),
    "threads": ([], "export OMP_NUM_THREADS=abc", "OMP_NUM_THREADS='abc' is invalid"),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", LACKS)
def test_what_is_missing_is_one_sentence(tiny_inputs, tmp_path, name, ranks):
    flags, before, message = LACKS[name]
    command, env = build_launch_command(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, *flags, ranks=ranks)
    done = subprocess.run(
        ["bash", "-c", f'{before}; exec "$@"', "bash", *command], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert re.match(f"error: (rank \\d failed: )?{message}", errors[0]), errors
    assert "Traceback" not in done.stderr, done.stderr


def test_a_run_without_home_or_temporary_folder(tiny_inputs, tmp_path):
    """Python finds both elsewhere."""
    command, env = build_launch_command(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, "--max_steps", "1", ranks=1)
    env = {name: value for name, value in env.items() if name != "HOME"} | {"TMPDIR": "/no/such/folder"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_compiler_of_a_recipe_must_run(tmp_path):
    env = os.environ | {"CXX": "/bin/false", "INTERNVL_VENV": "none", "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    variables = {"MODEL_PATH": "org/name", "META_PATH": __file__, "OUTPUT_DIR": str(tmp_path / "out")}
    done = subprocess.run(["bash", VISION_LORA_RECIPE], env=env | variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr
        == "setup.sh: no C++ compiler (/bin/false), which DeepSpeed requires to compile an op: apt-get install g++.\n"
    )
