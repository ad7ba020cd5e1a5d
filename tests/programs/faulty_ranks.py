"""Worlds of ranks of which one fails: a program that imports torch once and forks all ranks of all cases.

    python faulty_ranks.py '{"name": ["killed", 1, 3], ...}'   # fault, rank, number of ranks

Nobody watches the ranks, as under plain srun. Prints as JSON, by name: exit statuses by rank (-n: signal n), seconds to
the end of all, and what all ranks wrote to stderr.
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

from internvl.dist_utils import free_port, rank
from internvl.runtime.shutdown import abort_all_ranks_on_error, join_process_group, leave_rank_monitor

TIMEOUT = 6  # --ddp_timeout
AT_ONCE = 7  # cases
PATIENCE = 40  # seconds until what still runs counts as hanging


def wrong_input() -> None:
    raise ValueError("the picture is upside down.")


def bug() -> None:
    {}["no such key"]


def bad_disk() -> None:
    Path("/nowhere/file").read_text()


def out_of_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
    bytearray(1 << 40)


def asleep() -> None:
    """As on a file system that does not answer: the process lives, and its main thread takes part in nothing."""
    time.sleep(PATIENCE)


FAULTS: dict[str, Callable[[], None]] = {
    "wrong input": wrong_input,
    "bug": bug,
    "bad disk": bad_disk,
    "out of memory": out_of_memory,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crashed": lambda: ctypes.string_at(0),
    "exit": lambda: sys.exit(3),
    "exit in words": lambda: sys.exit("no more"),
    "exit without a word": lambda: os._exit(0),
    "asleep": asleep,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "leaves early": lambda: (leave_rank_monitor(), dist.destroy_process_group(), os._exit(0)),
    "nothing": lambda: None,
}
MET_BY_ALL = ("wrong input by all", "exit by all")


def one_rank(fault: str, faulty: int) -> None:
    """Three steps; the fault comes before the second, or, the ranks being done, to one that leaves later."""
    with abort_all_ranks_on_error():
        join_process_group(["--ddp_timeout", str(TIMEOUT)])
        dist.all_reduce(torch.ones(3))
        if rank() == faulty or fault in MET_BY_ALL:
            FAULTS[fault.removesuffix(" by all")]()
        for _ in range(2):
            dist.all_reduce(torch.ones(3))
    leave_rank_monitor()
    time.sleep(0.3 * (rank() == faulty))
    dist.destroy_process_group()


class World:
    """The ranks of a case, running."""

    def __init__(self, fault: str, faulty: int, ranks: int):
        self.stopped: int | None = None  # process id
        self.start, self.seconds = time.monotonic(), 0.0
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self.statuses: dict[int, int | str] = {}
        self.left = {}
        environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        for number in range(ranks):
            if fault == "absent" and number == faulty:
                self.statuses[number] = "absent"
            elif child := os.fork():
                self.left[child] = number
            else:
                os.dup2(self.stderr.fileno(), 2)
                os.environ.update(environment, RANK=str(number), LOCAL_RANK=str(number))
                os._exit(status_of(fault, faulty))

    def ended(self, child: int, status: int | str) -> None:
        self.statuses[self.left.pop(child)] = status
        self.seconds = time.monotonic() - self.start

    def told(self) -> dict:
        self.stderr.seek(0)
        statuses = [self.statuses[number] for number in sorted(self.statuses)]
        return {"statuses": statuses, "seconds": self.seconds, "stderr": self.stderr.read().decode()}


def status_of(fault: str, faulty: int) -> int:
    try:
        one_rank(fault, faulty)
    except SystemExit as error:
        return error.code
    return 0


def wait_for(worlds: list[World]) -> None:
    """Until all ranks have ended, or PATIENCE has; then `hangs` is their status."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and any(world.left for world in worlds):
        child, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        for world in worlds:
            if child in world.left:
                if os.WIFSTOPPED(status):
                    world.ended(child, "stopped")
                    world.stopped = child
                else:
                    world.ended(child, os.waitstatus_to_exitcode(status))
        if not child:
            time.sleep(0.01)
    for world in worlds:
        for child in list(world.left):
            os.kill(child, signal.SIGKILL)
            world.ended(child, "hangs")
        if world.stopped:
            os.kill(world.stopped, signal.SIGKILL)


if __name__ == "__main__":
    cases, told = list(json.loads(sys.argv[1]).items()), {}
    for first in range(0, len(cases), AT_ONCE):
        worlds = {name: World(*case) for name, case in cases[first : first + AT_ONCE]}
        wait_for(list(worlds.values()))
        told |= {name: world.told() for name, world in worlds.items()}
    print(json.dumps(told))
