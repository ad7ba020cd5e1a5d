"""Fuzz the readers of untrusted files, and check that the fuzzing sees faults."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.training_runs import TRAIN_ADAPTERS, train_in_process
from stress import untrusted_files
from stress.untrusted_files import fuzz, run_case

pytestmark = pytest.mark.stress

SEED, NUM_CASES = 7, 240


@pytest.fixture(scope="module")
def source(tiny_inputs, tmp_path_factory) -> SimpleNamespace:
    """Return the valid folders that cases start from."""
    run = tmp_path_factory.mktemp("source") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
        train_in_process(tiny_inputs, run, *TRAIN_ADAPTERS, "--max_steps", "3")
    model = tiny_inputs / "model"
    return SimpleNamespace(model=model, tokenizer=model, checkpoint=run / "checkpoint-3")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_untrusted_files_cause_no_harm(source, tmp_path):
    assert fuzz(source, tmp_path / "fuzz", SEED, range(NUM_CASES)) == []


def raise_value_error(message: str):
    raise ValueError(message)


# Faults that the fuzzing must see, and a word of the finding.
FAULTS = {
    "a file outside": (lambda case: Path(case, "../outside/bait.json").read_text(), "opened a file outside"),
    "a process": (lambda case: subprocess.run(["true"]), "subprocess.Popen"),
    "much memory": (lambda case: bytes(2 * untrusted_files.MAX_MEMORY_BYTES), "MemoryError"),
    "a FIFO": (lambda case: (os.mkfifo(case / "fifo"), (case / "fifo").read_text()), "no answer"),
    "a traceback": (lambda case: {}["a"], "KeyError"),
    "a long message": (lambda case: raise_value_error("x" * 2000), "not one sentence"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_fuzzing_sees_faults(tmp_path, monkeypatch, name):
    fault_fn, expected = FAULTS[name]
    monkeypatch.setattr(untrusted_files, "MAX_SECONDS", 2.0)
    monkeypatch.setattr(untrusted_files, "KINDS", {"fault": lambda grammar, source: lambda: fault_fn(grammar.folder)})
    kind, finding = run_case(0, 0, tmp_path / "fuzz", SimpleNamespace())
    assert kind == "fault" and expected in finding, finding
