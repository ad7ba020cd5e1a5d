"""Where the threads of this process, and the processes that read data for it, are right now. For `watchdog.py`."""

import contextlib
import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

INNERMOST = 4  # frames shown of a thread other than the main one
WATCHING = ("lifeline", "switchboard")
ANSWER = 0.5  # seconds for processes to write their stacks
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
        if thread is not threading.current_thread() and thread.name not in WATCHING:
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
            time.sleep(ANSWER)
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
