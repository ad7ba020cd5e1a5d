"""A step that takes far longer than usual shows where every rank is; then the run goes on."""

import os
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest
from helpers.training_runs import LORA, history, started, write_meta

from internvl.runtime.watchdog import Watchdog

PATIENCE = 120  # seconds until what still runs counts as hanging


@pytest.fixture
def watchdog():
    """Steps of 0.05 s are usual, 0.5 s a stall."""
    watchdog = Watchdog(factor=10, floor=0.3, rank=3)
    watchdog.start(1)
    for _ in range(5):
        time.sleep(0.05)
        watchdog.step_ended()
    yield watchdog
    watchdog.stop()


def test_a_long_step_is_told_once_and_that_it_went_on(watchdog, capfd):
    time.sleep(0.3)
    assert not capfd.readouterr().err
    time.sleep(1.5)
    watchdog.step_ended()
    time.sleep(0.4)
    watchdog.step_ended()
    told = [line for line in capfd.readouterr().err.split("\n") if line]
    assert all(line.startswith("[rank 3] ") for line in told)
    assert re.fullmatch(r"\[rank 3\] step 6 takes \d\.\d s, usual are 0\.\d s; this rank is in .*:", told[0])
    assert re.search(r"test_watchdog\.py:\d+ test_a_long_step_is_told_once", told[2])
    assert re.fullmatch(r"\[rank 3\] goes on after \d\.\d s", told[-1])
    assert len([line for line in told if "step" in line and "takes" in line]) == 1


def test_saving_is_measured_by_itself(watchdog, capfd):
    """As long as it ever took, it is no stall of a step; the first time it may take ten times the floor."""
    with watchdog.during("saving"):
        time.sleep(0.7)
    with watchdog.during("saving"):
        time.sleep(1.5)
    watchdog.step_ended()
    assert not capfd.readouterr().err
    watchdog.usual["saving"].extend([0.01] * 5)
    with watchdog.during("saving"):
        time.sleep(0.6)
    assert re.search(r"\[rank 3\] saving behind step 6 takes 0\.\d s", capfd.readouterr().err)


def test_it_costs_nothing(watchdog):
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(1000):
            watchdog.step_ended()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02, "20 microseconds a step"


def test_it_can_be_switched_off():
    before, watchdog = set(threading.enumerate()), Watchdog(factor=0, floor=0.1, rank=0)
    watchdog.start(1)
    assert not set(threading.enumerate()) - before
    watchdog.step_ended()
    watchdog.stop()


def test_a_file_that_one_rank_waits_for(tiny, goldens, tmp_path):
    """A picture becomes a pipe into which nobody writes: opening it takes as long as on a disk that does not answer."""
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for file in (goldens / "dataset/images").iterdir():
        os.link(file, images / file.name)
    write = tmp_path / "tiny"
    write.mkdir()
    (write / "model").symlink_to(tiny / "model")
    (write / "train.jsonl").symlink_to(tiny / "train.jsonl")
    write_meta(write, images)
    flags = [*LORA, *"--max_steps 40 --save_strategy no --watchdog_factor 3 --watchdog_seconds 2".split()]
    flags += ["--dataloader_num_workers", "1"]
    command, env = started(write, output, *flags, ranks=2)
    with open(tmp_path / "err", "wb") as err, subprocess.Popen(command, env=env, stderr=err, stdout=err) as process:
        try:
            told = wait_for("'epoch'", tmp_path / "err", process)
            assert "takes" not in told
            picture = images / "im0.png"
            content = picture.read_bytes()
            os.mkfifo(images / "pipe")
            os.replace(images / "pipe", picture)
            for rank in (0, 1):
                wait_for(f"[rank {rank}] step", tmp_path / "err", process)
            time.sleep(1.5)  # nothing is told twice
            feed(picture, content)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    told = [line for line in (tmp_path / "err").read_text(errors="replace").splitlines() if line.startswith("[rank ")]
    for rank in "01":
        mine = [line for line in told if line.startswith(f"[rank {rank}]")]
        assert len([line for line in mine if " takes " in line]) == 1
        assert re.fullmatch(rf"\[rank {rank}\] goes on after \d+\.\d s", mine[-1])
    reading = [re.search(r"rank (\d)\]   process \d+ .*, which reads data", line) for line in told]
    assert {match[1] for match in reading if match} == {"0", "1"}
    in_file = {line[6] for line in told if "internvl/data/images.py" in line}
    assert len(in_file) == 1, "one rank waits for the file"
    assert any(line[6] not in in_file and "distributed" in line for line in told), "the other for that rank"
    assert len(history(output)) == 40


def wait_for(text: str, file: Path, process: subprocess.Popen) -> str:
    """What is in the file once the text is."""
    until = time.monotonic() + PATIENCE
    while text not in (content := file.read_text(errors="replace")):
        assert process.poll() is None and time.monotonic() < until, content[-3000:]
        time.sleep(0.05)
    return content


def feed(pipe: Path, content: bytes) -> None:
    """Put the picture back, and let whoever waits for the pipe have it."""
    whole = pipe.with_name("whole")
    whole.write_bytes(content)
    with open(pipe, "wb") as reader:
        os.replace(whole, pipe)
        reader.write(content)
