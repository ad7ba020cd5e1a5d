"""Watch training runs from outside: output, steps, workers."""

import re
import time
from collections.abc import Callable, Iterable

import psutil

HANG_SECONDS = 120  # a process that still runs after this many seconds hangs
LOGGED_STEP = re.compile(r"'grad_norm'|grad norm ")  # once in the log line of each step


def count_logged_steps(output: str) -> int:
    """Count the optimizer steps that a run has logged."""
    return len(LOGGED_STEP.findall(output))


def wait_until(
    condition_fn: Callable[[], object],
    describe_fn: Callable[[], str],
    seconds: float = HANG_SECONDS,
    processes: Iterable = (),
) -> None:
    """Wait for a condition.

    Args:
        describe_fn: makes the message of the failure.
        processes: must not exit before (objects with `poll`).
    """
    deadline = time.monotonic() + seconds
    while not condition_fn():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline, describe_fn()
        time.sleep(0.02)


def find_workers(run: psutil.Process) -> list[tuple[psutil.Process, psutil.Process]]:
    """Find the forked dataloader workers below torchrun: (rank, worker), in rank order.

    Suspending a worker is like a file system that does not respond.
    """
    pairs = [(rank, worker) for rank in run.children() for worker in rank.children()]
    return [(rank, worker) for rank, worker in pairs if worker.name() == "pt_data_worker"]
