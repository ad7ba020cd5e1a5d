"""Tells where a rank is when a step takes far longer than usual: the stacks of its threads, once a stall.

Each rank watches itself. As all wait for one another, all notice when one is slow, and what the slow one prints tells
why. Fed by `metered.py` once a step, and around what is not a step.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from internvl.runtime.rank_monitor_server import write_stderr

NUM_REMEMBERED_STEPS = 100  # past steps, of which the usual is the median


class Phase(NamedTuple):
    """What a rank is in.

    Attributes:
        kind: `step`, or another that is usual for itself, such as `saving`.
        number: of the step.
        since: seconds of the monotonic clock.
    """

    kind: str
    number: int
    since: float


class Watchdog:
    """Watches from `start` to `stop`.

    Args:
        factor: how many times the usual is a stall.
        floor: seconds that are none.
        rank: for the report.
    """

    def __init__(self, factor: float, floor: float, rank: int):
        self.factor, self.floor, self.rank = factor, floor, rank
        self.usual: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_REMEMBERED_STEPS))
        self.phase: Phase | None = None
        self.reported: Phase | None = None
        self.stopped = threading.Event()

    def start(self, number: int) -> None:
        self.phase = Phase("step", number, time.monotonic())
        if self.factor > 0:
            self.stopped.clear()
            self.workers = ForkedProcesses()
            threading.Thread(target=self.watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()
        self.phase = None

    def step_ended(self) -> None:
        """The next step begins."""
        if self.phase is not None:
            self.enter("step", self.phase.number + 1)

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Something between two steps, or in one: the step begins anew behind it."""
        if self.phase is None:
            yield
            return
        outer = self.phase
        self.phase = Phase(kind, outer.number, time.monotonic())
        yield
        self.enter(outer.kind, outer.number)

    def enter(self, kind: str, number: int) -> None:
        """Another phase, the one before having ended well."""
        now = time.monotonic()
        self.usual[self.phase.kind].append(now - self.phase.since)
        if self.phase is self.reported:
            write_stderr(f"[rank {self.rank}] goes on after {now - self.phase.since:.1f} s")
        self.phase = Phase(kind, number, now)

    def limit(self, kind: str) -> tuple[float, float | None]:
        """Seconds that are a stall, and the usual; at first, when nothing is usual, of the floor."""
        past = list(self.usual[kind])
        if not past:
            return self.factor * self.floor, None
        usual = statistics.median(past)
        return max(self.floor, self.factor * usual), usual

    def watch(self) -> None:
        pause = self.floor
        while not self.stopped.wait(pause):
            pause, phase = self.floor, self.phase
            if phase is None or phase is self.reported:
                continue
            (limit, usual), passed = self.limit(phase.kind), time.monotonic() - phase.since
            if passed < limit:
                pause = min(self.floor, limit - passed)
                continue
            self.reported = phase
            write_stderr(self.report(phase, passed, usual))

    def report(self, phase: Phase, passed: float, usual: float | None) -> str:
        """Lines that all begin with the rank, so that those of several ranks can be told apart."""
        doing = f"step {phase.number}" if phase.kind == "step" else f"{phase.kind} behind step {phase.number - 1}"
        beside = "the first of its kind" if usual is None else f"usual are {usual:.1f} s"
        lines = [f"{doing} takes {passed:.1f} s, {beside}; this rank is in (innermost first):"]
        for name, stack in [*stacks_of_threads(), *self.workers.stacks()]:
            lines += [f"  {name}:", *(f"    {line}" for line in stack)]
        return "\n".join(f"[rank {self.rank}] {line}" for line in lines)


INNERMOST = 4  # frames shown of a thread other than the main one

MONITOR_THREADS = ("lifeline", "switchboard")

STACK_TIMEOUT = 0.5  # seconds for processes to write their stacks

FRAME = re.compile(r'^  File "(?P<path>.*)", line (?P<line>\d+) in (?P<function>.*)$')  # of faulthandler


def stacks_of_threads() -> Iterator[tuple[str, list[str]]]:
    """Name and stack of each thread, the main one first, without those that only watch.

    No file is opened: the disk may be what stalls.
    """
    frames, main = sys._current_frames(), threading.main_thread()
    for thread in sorted(threading.enumerate(), key=lambda thread: thread is not main):
        frame, stack = frames.get(thread.ident), []
        while frame is not None:
            stack.append(described(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        if thread is not threading.current_thread() and thread.name not in MONITOR_THREADS:
            yield f"thread {thread.name}", stack if thread is main else stack[:INNERMOST]


class ForkedProcesses:
    """Processes that are forked from now on write their stack when SIGUSR2 comes."""

    def __init__(self):
        self.file = tempfile.TemporaryFile(mode="a+")  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2, self.file, all_threads=False)

    def stacks(self) -> Iterator[tuple[str, list[str]]]:
        """Name and stack of each that answers."""
        for process in multiprocessing.active_children():
            if not listens(process.pid):
                continue
            begin = self.file.seek(0, os.SEEK_END)
            os.kill(process.pid, signal.SIGUSR2)
            time.sleep(STACK_TIMEOUT)
            self.file.seek(begin)
            frames = filter(None, map(FRAME.match, self.file.read().splitlines()))
            stack = [described(frame["path"], frame["line"], frame["function"]) for frame in frames]
            yield f"process {process.pid} ({process.name}), which reads data", stack or ["no answer"]


def listens(pid: int) -> bool:
    """Whether SIGUSR2 does not just end that process."""
    with contextlib.suppress(OSError, AttributeError):
        caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]
        return bool(int(caught, 16) >> (signal.SIGUSR2 - 1) & 1)
    return False


def described(path: str, line: int | str, function: str) -> str:
    """`file:line function`, the file from its package on."""
    for folder in ("/site-packages/", "/internvl_chat/"):
        path = path.rpartition(folder)[2]
    return f"{path}:{line} {function}"
