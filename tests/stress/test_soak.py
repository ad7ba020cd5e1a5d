"""Check that a long run leaks nothing: memory, files, processes, shared memory."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from helpers.paths import REPO_ROOT
from helpers.training_runs import TRAIN_ADAPTERS, train_in_process

pytestmark = pytest.mark.stress

STEPS, WINDOW = 2000, 100
# Bytes that a process may grow by between steps 200-400 and the last 200. Leaking half a tile per step would be 8 MB.
MAX_GROWTH = 8e6


@pytest.mark.multiprocess
def test_2000_steps_leak_nothing(tiny_inputs, tmp_path):
    output, temporary = tmp_path / "out", Path(tempfile.mkdtemp())  # a short path, as sockets in it need
    command = [
        sys.executable,
        Path(__file__).with_name("soak.py"),
        tiny_inputs,
        output,
        f"--steps={STEPS}",
        f"--window={WINDOW}",
    ]
    variables = {
        "PYTHONPATH": f"{REPO_ROOT}/internvl_chat:{REPO_ROOT}/tests",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary),
    }
    env = os.environ | variables | {"INTERNVL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((output / "soak.json").read_text())

    log = report["log"]
    assert [entry["step"] for entry in log] == list(range(WINDOW, STEPS + 1, WINDOW))
    for processes in ("own", "workers"):
        begin, end = (sum(entry[processes] for entry in entries) / len(entries) for entries in (log[1:4], log[-2:]))
        assert end - begin < MAX_GROWTH, (processes, [entry[processes] for entry in log])
    assert max(entry["open files"] for entry in log[-5:]) <= max(entry["open files"] for entry in log[:5]) + 10
    for resource, count in report["before"].items():
        assert report["after"][resource] <= count, resource
    assert {name for name in report["output"] if name.startswith("checkpoint")} == {
        "checkpoint-1900",
        "checkpoint-2000",
    }
    assert not [path for path in temporary.iterdir() if path.name != f"torchinductor_{Path.home().name}"]
    shutil.rmtree(temporary)


def test_dataloader_workers_end_with_the_training(tiny_inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    before = set(psutil.Process().children())
    train_in_process(
        tiny_inputs,
        tmp_path / "out",
        *TRAIN_ADAPTERS,
        "--max_steps",
        "2",
        "--dataloader_num_workers",
        "2",
        "--save_strategy",
        "no",
    )
    assert set(psutil.Process().children()) <= before
