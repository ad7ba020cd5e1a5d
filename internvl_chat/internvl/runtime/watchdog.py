"""Watchdog: prints the stacks of threads and workers when a step stalls.

Each rank watches itself. Ranks wait for each other in collectives, so all of them report when one is slow, and the
stacks of the slow one show the reason. The trainer calls `begin_next_step` once per step. Other activities, such as
saving, run within `during`.
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

from internvl.runtime.rank_monitor_server import MONITOR_THREAD_PREFIX, write_stderr

NUM_REMEMBERED_PHASES = 100  # of each kind; the median of their durations is the usual duration
NUM_OTHER_THREAD_FRAMES = 4  # innermost frames shown of a thread other than the main one
STACK_TIMEOUT = 0.5  # seconds for a worker process to write its stack
FAULTHANDLER_FRAME = re.compile(r'^  File "(?P<path>.*)", line (?P<line>\d+) in (?P<function>.*)$')


class Phase(NamedTuple):
    """What a rank is doing.

    Attributes:
        kind: `step`, or an activity whose duration is compared separately, such as `saving`.
        step: number of the current step, or of the next one during another activity.
        started_at: seconds of `time.monotonic()`.
    """

    kind: str
    step: int
    started_at: float

    def describe(self) -> str:
        """Format the phase: `step 7`, `saving after step 6`."""
        return f"step {self.step}" if self.kind == "step" else f"{self.kind} after step {self.step - 1}"


class Watchdog:
    """Thread that reports stalls between `start` and `stop`.

    A phase stalls when it takes `factor` times the median of its kind, and at least `min_stall_seconds`. While there is
    no earlier phase of its kind, the limit is `factor * min_stall_seconds`.

    Args:
        factor: 0 disables the watchdog.
        rank: for the report.
    """

    def __init__(self, factor: float, min_stall_seconds: float, rank: int):
        self.factor, self.min_stall_seconds, self.rank = factor, min_stall_seconds, rank
        self.durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=NUM_REMEMBERED_PHASES))  # by kind
        self.phase: Phase | None = None
        self.reported_phase: Phase | None = None
        self.stop_event = threading.Event()

    def start(self, step: int) -> None:
        """Start watching; `step` begins now."""
        self.phase = Phase("step", step, time.monotonic())
        if self.factor > 0:
            self.stop_event.clear()
            self.worker_stacks = WorkerStacks()
            threading.Thread(target=self.watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self.stop_event.set()
        self.phase = None

    def begin_next_step(self) -> None:
        """Begin the next step."""
        if self.phase is not None:
            self.enter("step", self.phase.step + 1)

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Watch an activity other than a step.

        After it, the interrupted step is timed from the beginning.
        """
        if self.phase is None:
            yield
            return
        outer = self.phase
        self.phase = Phase(kind, outer.step, time.monotonic())
        try:
            yield
        finally:
            self.enter(outer.kind, outer.step)

    def enter(self, kind: str, step: int) -> None:
        """Record the duration of the current phase and begin another."""
        assert self.phase is not None
        now = time.monotonic()
        duration = now - self.phase.started_at
        self.durations[self.phase.kind].append(duration)
        if self.phase is self.reported_phase:
            write_stderr(f"[rank {self.rank}] {self.phase.describe()} finished after {duration:.1f} s")
        self.phase = Phase(kind, step, now)

    def compute_stall_limit(self, kind: str) -> tuple[float, float | None]:
        """Compute the seconds that count as a stall, and the median.

        The median is None for the first phase of a kind.
        """
        durations = list(self.durations[kind])
        if not durations:
            return self.factor * self.min_stall_seconds, None
        median = statistics.median(durations)
        return max(self.min_stall_seconds, self.factor * median), median

    def watch(self) -> None:
        """Report each stalled phase once, until `stop`."""
        pause = self.min_stall_seconds
        while not self.stop_event.wait(pause):
            # The main thread replaces `self.phase`, and never changes one: reading it once needs no lock.
            pause, phase = self.min_stall_seconds, self.phase
            if phase is None or phase is self.reported_phase:
                continue
            (limit, median), elapsed = self.compute_stall_limit(phase.kind), time.monotonic() - phase.started_at
            if elapsed < limit:
                pause = min(self.min_stall_seconds, limit - elapsed)
                continue
            self.reported_phase = phase
            write_stderr(self.format_report(phase, elapsed, median))

    def format_report(self, phase: Phase, elapsed: float, median: float | None) -> str:
        """Format the report of a stall, with all stacks.

        Each line begins with the rank, because all ranks write to the same stderr.
        """
        comparison = "no earlier one to compare with" if median is None else f"median {median:.1f} s"
        lines = [f"{phase.describe()} is slow: {elapsed:.1f} s so far, {comparison}. Stacks, innermost frame first:"]
        for name, stack in [*collect_thread_stacks(), *self.worker_stacks.collect()]:
            lines += [f"  {name}:", *(f"    {frame}" for frame in stack)]
        return "\n".join(f"[rank {self.rank}] {line}" for line in lines)


def collect_thread_stacks() -> Iterator[tuple[str, list[str]]]:
    """Yield name and stack of each thread, the main one first.

    Threads of watchdog and rank monitor are left out. Unlike `traceback`, this reads no source files, because the stall
    may be due to the disk.
    """
    frames, main_thread = sys._current_frames(), threading.main_thread()
    for thread in sorted(threading.enumerate(), key=lambda thread: thread is not main_thread):
        frame, stack = frames.get(thread.ident or 0), []
        while frame is not None:
            stack.append(format_frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        is_monitor = thread is threading.current_thread() or thread.name.startswith(MONITOR_THREAD_PREFIX)
        if not is_monitor:
            yield f"thread {thread.name}", stack if thread is main_thread else stack[:NUM_OTHER_THREAD_FRAMES]


class WorkerStacks:
    """Stacks of worker processes forked from now on.

    A forked child inherits faulthandler's signal handler and the open temporary file: on SIGUSR2 it writes its stack
    there, even while its main thread is stuck in C.
    """

    def __init__(self):
        self.file = tempfile.TemporaryFile(mode="a+")  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2, self.file, all_threads=False)

    def collect(self) -> Iterator[tuple[str, list[str]]]:
        """Yield name and stack of each worker process."""
        for process in multiprocessing.active_children():
            if process.pid is None or not handles_sigusr2(process.pid):
                continue
            start = self.file.seek(0, os.SEEK_END)
            os.kill(process.pid, signal.SIGUSR2)
            time.sleep(STACK_TIMEOUT)
            self.file.seek(start)
            frames = filter(None, map(FAULTHANDLER_FRAME.match, self.file.read().splitlines()))
            stack = [format_frame(frame["path"], frame["line"], frame["function"]) for frame in frames]
            yield f"worker process {process.pid} ({process.name})", stack or ["no response"]


def handles_sigusr2(pid: int) -> bool:
    """Check that a process handles SIGUSR2, which would kill it otherwise."""
    with contextlib.suppress(OSError):  # no /proc (macOS), no such process
        status = Path(f"/proc/{pid}/status").read_text()
        match = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
        if match is None:
            return False
        caught_signals = int(match[1], 16)  # bit n-1: signal n
        return bool(caught_signals >> (signal.SIGUSR2 - 1) & 1)
    return False


def format_frame(path: str, line: int | str, function: str) -> str:
    """Format as `file:line function`, with the file's path inside its package."""
    for folder in ("/site-packages/", "/internvl_chat/"):
        path = path.rpartition(folder)[2]
    return f"{path}:{line} {function}"
