"""Run groups of ranks, one rank of which fails.

Imports torch once and forks all ranks of all cases.

    python faulty_ranks.py '{"name": ["killed", 1, 3], ...}'   # fault, faulty rank, world size

No launcher watches the ranks, as under plain srun. Prints JSON by name: exit statuses by rank (-n for signal n),
seconds until all ranks have exited, and stderr of all ranks.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from internvl.dist_utils import get_rank
from internvl.launchers import find_free_port
from internvl.runtime.shutdown import abort_all_ranks_on_error, join_process_group, leave_rank_monitor

DDP_TIMEOUT = 6  # seconds
NUM_CASES_AT_ONCE = 7
HANG_SECONDS = 40  # a rank that still runs after this many seconds hangs


def raise_invalid_input() -> None:
    raise ValueError("the image is upside down.")


def raise_bug() -> None:
    {}["no such key"]


def read_missing_file() -> None:
    Path("/nowhere/file").read_text()


def run_out_of_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
    bytearray(1 << 40)


def sleep() -> None:
    """Block only the main thread, like a file system without response."""
    time.sleep(HANG_SECONDS)


FAULTS: dict[str, Callable[[], None]] = {
    "invalid input": raise_invalid_input,
    "bug": raise_bug,
    "missing file": read_missing_file,
    "out of memory": run_out_of_memory,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crashed": lambda: ctypes.string_at(0),
    "exit": lambda: sys.exit(3),
    "exit with message": lambda: sys.exit("no more"),
    "exit without report": lambda: os._exit(0),
    "asleep": sleep,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "early end": lambda: (leave_rank_monitor(), dist.destroy_process_group(), os._exit(0)),
    "none": lambda: None,
}
ON_ALL_RANKS = " on all ranks"  # suffix of a fault


def run_rank(fault: str, faulty_rank: int) -> None:
    """Take three steps, with the fault before the second.

    Without a fault, the faulty rank exits last.
    """
    with abort_all_ranks_on_error():
        join_process_group(["--ddp_timeout", str(DDP_TIMEOUT)])
        dist.all_reduce(torch.ones(3))
        if get_rank() == faulty_rank or fault.endswith(ON_ALL_RANKS):
            FAULTS[fault.removesuffix(ON_ALL_RANKS)]()
        for _ in range(2):
            dist.all_reduce(torch.ones(3))
    leave_rank_monitor()
    time.sleep(0.3 * (get_rank() == faulty_rank))
    dist.destroy_process_group()


class Case:
    """The running ranks of a case."""

    def __init__(self, fault: str, faulty_rank: int, world_size: int):
        self.stopped_pid: int | None = None
        self.start, self.seconds = time.monotonic(), 0.0
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.statuses: dict[int, int | str] = {}  # by rank
        self.running: dict[int, int] = {}  # process id -> rank
        environment = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_port()}
        for rank in range(world_size):
            if fault == "absent" and rank == faulty_rank:
                self.statuses[rank] = "absent"
            elif pid := os.fork():
                self.running[pid] = rank
            else:
                os.dup2(self.stderr.fileno(), 2)
                os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
                os._exit(run_and_get_status(fault, faulty_rank))

    def record_exit(self, pid: int, status: int | str) -> None:
        self.statuses[self.running.pop(pid)] = status
        self.seconds = time.monotonic() - self.start

    def outcome(self) -> dict:
        self.stderr.seek(0)
        statuses = [self.statuses[rank] for rank in sorted(self.statuses)]
        return {"statuses": statuses, "seconds": self.seconds, "stderr": self.stderr.read().decode()}


def run_and_get_status(fault: str, faulty_rank: int) -> int:
    """Run a rank in a forked child; return its exit status."""
    try:
        run_rank(fault, faulty_rank)
    except SystemExit as error:
        return error.code
    return 0


def wait_for(cases: list[Case]) -> None:
    """Wait until all ranks have exited; kill those that hang."""
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline and any(case.running for case in cases):
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        for case in cases:
            if pid in case.running:
                if os.WIFSTOPPED(status):
                    case.record_exit(pid, "stopped")
                    case.stopped_pid = pid
                else:
                    case.record_exit(pid, os.waitstatus_to_exitcode(status))
        if not pid:
            time.sleep(0.01)
    for case in cases:
        for pid in list(case.running):
            os.kill(pid, signal.SIGKILL)
            case.record_exit(pid, "hangs")
        if case.stopped_pid:
            os.kill(case.stopped_pid, signal.SIGKILL)


if __name__ == "__main__":
    cases, outcomes = list(json.loads(sys.argv[1]).items()), {}
    for first in range(0, len(cases), NUM_CASES_AT_ONCE):
        running = {name: Case(*case) for name, case in cases[first : first + NUM_CASES_AT_ONCE]}
        wait_for(list(running.values()))
        outcomes |= {name: case.outcome() for name, case in running.items()}
    print(json.dumps(outcomes))
