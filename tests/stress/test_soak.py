"""What a long run leaves: no memory that grows, no files, processes or shared memory. The run is `soak.py`."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from helpers.training_runs import LORA, ROOT, run_here

STEPS, WINDOW = 2000, 100
GROWTH = 8e6  # bytes of a process from steps 200-400 to the last 200: half a tile of these a step would be 8 MB


@pytest.mark.slow
def test_2000_steps_leave_nothing_behind(tiny, tmp_path):
    output, temporary = tmp_path / "out", Path(tempfile.mkdtemp())  # a short path, as sockets in it need
    command = [
        sys.executable,
        Path(__file__).with_name("soak.py"),
        tiny,
        output,
        f"--steps={STEPS}",
        f"--window={WINDOW}",
    ]
    ours = {"PYTHONPATH": f"{ROOT}/internvl_chat:{ROOT}/tests", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    env = os.environ | ours | {"INTERNVL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((output / "soak.json").read_text())

    seen = report["seen"]
    assert [entry["step"] for entry in seen] == list(range(WINDOW, STEPS + 1, WINDOW))
    for whose in ("own", "workers"):
        begin, end = (sum(entry[whose] for entry in part) / len(part) for part in (seen[1:4], seen[-2:]))
        assert end - begin < GROWTH, (whose, [entry[whose] for entry in seen])
    assert max(entry["open files"] for entry in seen[-5:]) <= max(entry["open files"] for entry in seen[:5]) + 10
    for what, count in report["before"].items():
        assert report["after"][what] <= count, what
    assert {name for name in report["kept"] if name.startswith("checkpoint")} == {"checkpoint-1900", "checkpoint-2000"}
    assert not [path for path in temporary.iterdir() if path.name != f"torchinductor_{Path.home().name}"]
    shutil.rmtree(temporary)


def test_dataloader_workers_end_with_the_training(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    before = set(psutil.Process().children())
    run_here(
        tiny, tmp_path / "out", *LORA, "--max_steps", "2", "--dataloader_num_workers", "2", "--save_strategy", "no"
    )
    assert set(psutil.Process().children()) <= before
