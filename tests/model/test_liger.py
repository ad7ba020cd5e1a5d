"""`--use_liger` does not change losses and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.multiprocess


def test_liger_kernels_change_no_result():
    """Run the comparison in its own process.

    Without a GPU it needs Triton's interpreter, and Liger replaces functions of transformers.
    """
    program = Path(__file__).parents[1] / "programs/liger_kernels.py"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", program]
    env = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
