"""`--use_liger` does not change losses and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "programs/liger_kernels.py"


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        pytest.param([], {"TRITON_INTERPRET": "1"}, marks=pytest.mark.multiprocess, id="interpreter"),
        pytest.param(["-m", "gpu"], {}, marks=pytest.mark.gpu, id="gpu"),
    ],
)
def test_liger_kernels_change_no_result(flags, variables):
    """Run the comparison in its own process: Liger replaces functions of transformers."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", *flags, PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
