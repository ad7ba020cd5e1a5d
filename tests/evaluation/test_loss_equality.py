"""Evaluation losses do not depend on ranks, ZeRO or rows, and evaluation does not change training.

Losses are the sums over samples, equal to 1e-6 of their size in fp32. The reference is the LLM of transformers on one
sample at a time, with a cross entropy in float64.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.evaluation_cases import (
    MODELS,
    ROW_SIZES,
    ZERO_CONFIGS,
    compute_losses_by_transformers,
    open_evaluation_sets,
    write_evaluation_sets,
)
from helpers.forked_ranks import ForkedRanks
from helpers.paths import REPO_ROOT
from helpers.training_runs import ZERO_FLAGS, build_run_environment

from internvl.launchers import find_free_port

pytestmark = pytest.mark.multiprocess


def run_program(folder: Path, name: str, *args: str, ranks: int) -> None:
    """Run a program of `tests/programs` on forked ranks."""
    command = [str(REPO_ROOT / "tests/programs" / name), *args]
    done = ForkedRanks(command, build_run_environment(folder), ranks, find_free_port(), folder).wait()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


@pytest.fixture(scope="module")
def expected(goldens, tmp_path_factory) -> dict[str, list[tuple]]:
    """Compute the losses of each model by transformers."""
    folder = tmp_path_factory.mktemp("sets")
    write_evaluation_sets(folder)
    data = open_evaluation_sets(folder, goldens / "tokenizer")
    tokenizer = data.dataset.datasets[0].tokenizer
    return {name: compute_losses_by_transformers(build_fn(tokenizer), data) for name, build_fn in MODELS.items()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_losses_are_equal_under_every_zero_config_in_rows_of_every_size(goldens, tmp_path, expected, ranks):
    write_evaluation_sets(tmp_path)
    run_program(tmp_path, "evaluation_losses.py", str(tmp_path), str(goldens / "tokenizer"), ranks=ranks)
    results = json.loads((tmp_path / "losses.json").read_text())
    assert len(results) == len(MODELS) * len(ZERO_CONFIGS) * len(ROW_SIZES)
    for case, losses in results.items():
        sums, tokens, correct = zip(*losses, strict=True)
        expected_sums, *expected_counts = zip(*expected[case.split()[0]], strict=True)
        is_exact = "bf16" not in case
        np.testing.assert_allclose(sums, expected_sums, rtol=1e-6 if is_exact else 0.05, err_msg=case)
        assert tokens == expected_counts[0] and (correct == expected_counts[1] or not is_exact), case


def test_evaluation_changes_no_bit_of_training(tiny_inputs, goldens, tmp_path):
    """Training has dropout, drop path and noise, and an evaluation before its first step."""
    for name in ("model", "meta.json"):
        os.symlink(tiny_inputs / name, tmp_path / name)
    write_evaluation_sets(tmp_path)
    args = str(tmp_path), str(goldens / "tokenizer"), json.dumps(ZERO_FLAGS)
    run_program(tmp_path, "training_with_evaluation.py", *args, ranks=2)
    results = json.loads((tmp_path / "runs.json").read_text())
    assert results.keys() == ZERO_FLAGS.keys()
    for name, (without, with_evaluation) in results.items():
        assert with_evaluation["losses"] == without["losses"] and len(without["losses"]) == 6, name
        assert with_evaluation["digest"] == without["digest"], name
        first, *others = with_evaluation["evaluation_losses"]
        assert len(others) == 2 and all(abs(loss - first) > 1e-5 for loss in others), name
