"""Faults in real runs: a rank or one of its processes is killed, or waits for ever; the run ends and says why."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers.training_runs import ENTRY, LORA, started, write_meta

from internvl.dist_utils import free_port

PATIENCE = 90  # seconds until what still runs counts as hanging
TIMEOUT = 10  # --ddp_timeout


class Run:
    """A training of two ranks on pictures of its own, all of whose output goes into one file."""

    def __init__(self, tiny: Path, goldens: Path, folder: Path, flags: list[str], agent: bool):
        self.images, data, self.output = folder / "images", folder / "tiny", folder / "printed"
        self.images.mkdir()
        data.mkdir()
        for file in (goldens / "dataset/images").iterdir():
            os.link(file, self.images / file.name)
        for name in ("model", "train.jsonl"):
            (data / name).symlink_to(tiny / name)
        write_meta(data, self.images)
        forever = ["--max_steps", "100000", "--save_strategy", "no", "--no_smoke_save", "--ddp_timeout", str(TIMEOUT)]
        command, env = started(data, folder / "out", *LORA, *forever, *flags, ranks=2)
        self.started: list[subprocess.Popen] = []
        bare = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
        with self.output.open("wb") as printed:
            for rank in [None] if agent else ["0", "1"]:
                if not agent:
                    env |= {**bare, "RANK": rank, "LOCAL_RANK": rank}
                    command = [command[0], *command[command.index(str(ENTRY)) :]]
                self.started.append(psutil.Popen(command, env=env, stdout=printed, stderr=printed))
        self.wait_for("'epoch'")
        self.family = [*self.started, *(child for one in self.started for child in one.children(recursive=True))]

    def printed(self) -> str:
        return self.output.read_text(errors="replace").replace("\r", "\n")

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + PATIENCE
        while text not in self.printed():
            assert all(one.poll() is None for one in self.started) and time.monotonic() < until, self.printed()[-3000:]
            time.sleep(0.05)

    def rank(self, number: int) -> psutil.Process:
        of_rank = [one for one in self.family if one.environ().get("RANK") == str(number)]
        return next(one for one in of_rank if one.ppid() not in {other.pid for other in of_rank})

    def end(self) -> tuple[list[int], float, list[str]]:
        """Exit statuses, seconds until all processes are gone, the lines that tell of an error."""
        start = time.monotonic()
        _, alive = psutil.wait_procs(self.family, PATIENCE)
        seconds = time.monotonic() - start
        for process in alive:
            process.kill()
        assert not alive, f"{alive} hang: {self.printed()[-3000:]}"
        told = [line for line in self.printed().splitlines() if re.match("error|Traceback|.*Error", line)]
        return [one.wait() for one in self.started], seconds, told


def kill(rank: int) -> Callable[[Run], None]:
    return lambda run: run.rank(rank).kill()


def kill_reader(run: Run) -> None:
    run.rank(1).children()[0].kill()


def withhold(run: Run) -> None:
    """A picture becomes a pipe into which nobody writes."""
    os.mkfifo(run.images / "pipe")
    os.replace(run.images / "pipe", run.images / "im0.png")


ZERO_2, ZERO_3 = (["--deepspeed", f"zero_stage{stage}_config.json"] for stage in (2, 3))
KILLED = [-signal.SIGKILL, 1]
ENDED = "a process that reads data has ended; if memory ran out, .*"
READER_KILLED = rf"RuntimeError: DataLoader worker \(pid \d+\) is killed by signal: Killed; {ENDED}"
# One that has not begun to read is not watched by torch, which then does not know the signal.
UNWATCHED_KILLED = rf"RuntimeError: DataLoader worker \(pid\(s\) \d+\) exited unexpectedly; {ENDED}"
# name -> flags, under torchrun?, fault, exit statuses, the message, seconds to the end
FAULTS = {
    "rank killed, torchrun": (ZERO_3, True, kill(1), [137], "error: rank 1 was ended by SIGKILL", 10),
    "rank killed, no agent": ([], False, kill(0), KILLED, "error: rank 0 ended without a word: killed, .*", 10),
    "reader killed, torchrun": (
        ["--dataloader_num_workers", "1"],
        True,
        kill_reader,
        [1],
        rf"error on rank 1: {READER_KILLED}",
        15,
    ),
    "a file that does not answer, no agent": (
        ZERO_2,
        False,
        withhold,
        [1, 1],
        r"error: rank \d did not take part in what rank \d waited for: RuntimeError: Timed out waiting 10000ms .*",
        TIMEOUT + 10,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_all_processes_with_one_message(tiny, goldens, tmp_path, name):
    flags, agent, fault, statuses, message, seconds = FAULTS[name]
    run = Run(tiny, goldens, tmp_path, flags, agent)
    fault(run)
    found, took, told = run.end()
    assert len(told) == 1 and re.fullmatch(message, told[0]), "\n".join(told) + run.printed()[-3000:]
    assert found == statuses and took < seconds


def command_line(process: psutil.Process) -> str:
    """Empty for one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["the run", "one that measures"])
def test_processes_that_measure_end_with_the_run_and_the_run_with_them(tiny, tmp_path, killed):
    data = tmp_path / "tiny"
    data.mkdir()
    (data / "model").symlink_to(tiny / "model")
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello" * 50}]
    lines = [json.dumps({"id": number, "conversations": turns}) for number in range(60_000)]
    (data / "train.jsonl").write_text("\n".join(lines))
    write_meta(data, tmp_path)
    command, env = started(data, tmp_path / "out", *LORA, ranks=1)
    with psutil.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        until = time.monotonic() + PATIENCE
        while len(measuring := [one for one in run.children() if "spawn_main" in command_line(one)]) < 2:
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        (run if killed == "the run" else measuring[0]).kill()
        _, alive = psutil.wait_procs([*measuring, run], PATIENCE)
        for process in alive:
            process.kill()
        told = [line for line in run.stderr.read().splitlines() if line.startswith("error")]
    assert not alive, f"{alive} are left"
    if killed != "the run":
        assert run.returncode == 1 and len(told) == 1
        assert re.fullmatch(f"error: ({READER_KILLED}|{UNWATCHED_KILLED})", told[0])
