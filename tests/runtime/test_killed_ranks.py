"""Killed ranks, killed workers and stalled workers in real training runs.

All processes end, and one message names the fault.
"""

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers.live_runs import HANG_SECONDS, count_logged_steps, wait_until
from helpers.paths import FINETUNE_PROGRAM
from helpers.training_runs import TRAIN_ADAPTERS, build_launch_command, write_meta_file

from internvl.launchers import find_free_port

pytestmark = pytest.mark.multiprocess
DDP_TIMEOUT = 10  # seconds


class Run:
    """An endless training run of two ranks, with one log file.

    Args:
        torchrun: start the ranks by torchrun, else without a launcher that watches them.
    """

    def __init__(self, tiny_inputs: Path, folder: Path, flags: list[str], torchrun: bool):
        self.log = folder / "log"
        endless = "--max_steps 100000 --save_strategy no --no_smoke_save --ddp_timeout".split() + [str(DDP_TIMEOUT)]
        command, env = build_launch_command(tiny_inputs, folder / "out", *TRAIN_ADAPTERS, *endless, *flags, ranks=2)
        self.started: list[psutil.Popen] = []
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_port(), "WORLD_SIZE": "2"}
        with self.log.open("wb") as log:
            for rank in [None] if torchrun else ["0", "1"]:
                if not torchrun:
                    env |= {**rendezvous, "RANK": rank, "LOCAL_RANK": rank}
                    command = [command[0], *command[command.index(str(FINETUNE_PROGRAM)) :]]
                self.started.append(psutil.Popen(command, env=env, stdout=log, stderr=log))
        wait_until(lambda: count_logged_steps(self.printed()), lambda: self.printed()[-3000:], processes=self.started)
        self.processes = [*self.started, *(child for one in self.started for child in one.children(recursive=True))]

    def printed(self) -> str:
        return self.log.read_text(errors="replace").replace("\r", "\n")

    def find_rank(self, rank: int) -> psutil.Process:
        """Find the process of a rank: its workers have the same environment."""
        same_rank = [process for process in self.processes if process.environ().get("RANK") == str(rank)]
        return next(process for process in same_rank if process.ppid() not in {other.pid for other in same_rank})

    def wait(self) -> tuple[list[int], float, list[str]]:
        """Wait for the end of all processes.

        Returns:
            Exit statuses of the started processes, seconds until all are gone, lines about an error.
        """
        start = time.monotonic()
        _, alive = psutil.wait_procs(self.processes, HANG_SECONDS)
        seconds = time.monotonic() - start
        for process in alive:
            process.kill()
        assert not alive, f"{alive} hang: {self.printed()[-3000:]}"
        error_lines = [line for line in self.printed().splitlines() if re.match("error|Traceback|.*Error", line)]
        return [process.wait() for process in self.started], seconds, error_lines


def kill_rank(rank: int) -> Callable[[Run], None]:
    return lambda run: run.find_rank(rank).kill()


def kill_worker(run: Run) -> None:
    run.find_rank(1).children()[0].kill()


def suspend_worker(run: Run) -> None:
    """As by a file system that does not respond."""
    run.find_rank(1).children()[0].suspend()


ZERO_2, ZERO_3 = (["--deepspeed", f"zero_stage{stage}_config.json"] for stage in (2, 3))
WORKER_DIED = "a DataLoader worker died; if memory ran out: .*"
WORKER_KILLED = rf"RuntimeError: DataLoader worker \(pid \d+\) is killed by signal: Killed; {WORKER_DIED}"
# torch does not watch a worker that has not begun to read, and does not know its signal.
UNWATCHED_WORKER_KILLED = rf"RuntimeError: DataLoader worker \(pid\(s\) \d+\) exited unexpectedly; {WORKER_DIED}"
# name -> flags, torchrun?, fault, exit statuses, message, seconds until the end
FAULTS = {
    "rank killed, torchrun": (ZERO_3, True, kill_rank(1), [137], "error: rank 1 was killed by SIGKILL", 10),
    "rank killed, no launcher": (
        [],
        False,
        kill_rank(0),
        [-signal.SIGKILL, 1],
        "error: rank 0 exited without an error report; probably killed .*",
        10,
    ),
    "worker killed, torchrun": (
        ["--dataloader_num_workers", "1"],
        True,
        kill_worker,
        [1],
        rf"error: rank 1 failed: {WORKER_KILLED}",
        15,
    ),
    "stalled worker, no launcher": (
        [*ZERO_2, "--dataloader_num_workers", "1"],
        False,
        suspend_worker,
        [1, 1],
        r"error: rank \d did not join a collective that rank \d waited for: RuntimeError: Timed out waiting 10000ms .*",
        DDP_TIMEOUT + 10,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_all_processes_with_one_message(tiny_inputs, tmp_path, name):
    flags, torchrun, fault_fn, statuses, message, max_seconds = FAULTS[name]
    run = Run(tiny_inputs, tmp_path, flags, torchrun)
    fault_fn(run)
    actual_statuses, seconds, error_lines = run.wait()
    assert len(error_lines) == 1 and re.fullmatch(message, error_lines[0]), (
        "\n".join(error_lines) + run.printed()[-3000:]
    )
    assert actual_statuses == statuses and seconds < max_seconds


def read_command_line(process: psutil.Process) -> str:
    """Read a process's command line; empty if it has just exited."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.parametrize("victim", ["run", "measuring worker"])
def test_a_run_and_its_measuring_workers_end_together(tiny_inputs, tmp_path, victim):
    data = tmp_path / "tiny"
    data.mkdir()
    (data / "model").symlink_to(tiny_inputs / "model")
    conversation = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello" * 50}]
    lines = [json.dumps({"id": number, "conversations": conversation}) for number in range(60_000)]
    (data / "train.jsonl").write_text("\n".join(lines))
    write_meta_file(data, tmp_path)
    command, env = build_launch_command(data, tmp_path / "out", *TRAIN_ADAPTERS, ranks=1)
    with psutil.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:

        def find_workers() -> list[psutil.Process]:
            return [child for child in run.children() if "spawn_main" in read_command_line(child)]

        wait_until(lambda: len(find_workers()) >= 2, lambda: "no workers", processes=[run])
        workers = find_workers()
        (run if victim == "run" else workers[0]).kill()
        _, alive = psutil.wait_procs([*workers, run], HANG_SECONDS)
        for process in alive:
            process.kill()
        error_lines = [line for line in run.stderr.read().splitlines() if line.startswith("error")]
    assert not alive, f"{alive} hang"
    if victim != "run":
        assert run.returncode == 1 and len(error_lines) == 1
        assert re.fullmatch(f"error: ({WORKER_KILLED}|{UNWATCHED_WORKER_KILLED})", error_lines[0])
