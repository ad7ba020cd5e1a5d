"""`--use_liger` does not change losses and gradients."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

PROGRAM = Path(__file__).parents[1] / "programs/liger_kernels.py"
triton, numpy = (Version(version(name)) for name in ("triton", "numpy"))
# Without a GPU, Liger cannot be imported with Triton 3.2, and the interpreters of 3.5 and 3.6 fail with numpy 2.4.
HAS_INTERPRETER = triton >= Version("3.8") or (triton >= Version("3.5") and numpy < Version("2.4"))


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        pytest.param(
            [],
            {"TRITON_INTERPRET": "1"},
            marks=[
                pytest.mark.multiprocess,
                pytest.mark.skipif(not HAS_INTERPRETER, reason=f"Triton {triton} with numpy {numpy} needs a GPU"),
            ],
            id="interpreter",
        ),
        pytest.param(["-m", "gpu"], {}, marks=pytest.mark.gpu, id="gpu"),
    ],
)
def test_liger_kernels_change_no_result(flags, variables):
    """Run the comparison in its own process: Liger replaces functions of transformers."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *flags, PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
