"""`--use_liger` changes no number."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def test_liger_computes_the_same():
    """A process of its own: Triton's interpreter stands in for a GPU, and Liger replaces functions of transformers."""
    program = Path(__file__).parents[1] / "programs/liger_kernels.py"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", program]
    env = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr
