"""Processes that end with the process that started them, even if that is killed."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import parent_process

from internvl.runtime.output_lock import read_process_start
from internvl.runtime.signals import exit_immediately

POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
TORCHRUN_PID = "INTERNVL_TORCHRUN_PID"  # set by shell/torchrun.py
# Variables of launchers that start ranks as their children. SLURM ends the tasks of a step itself.
PARENT_LAUNCHERS = {"TORCHELASTIC_RUN_ID": "torchrun", "OMPI_COMM_WORLD_RANK": "mpirun"}


def exit_with_launcher() -> None:
    """Exit this rank when its launcher ends, while it starts as well.

    Otherwise ranks of a killed torchrun retry the connection to its store until --ddp_timeout, or train unnoticed.
    """
    name = next((name for variable, name in PARENT_LAUNCHERS.items() if variable in os.environ), None)
    if name is not None:
        launcher, message = os.getppid(), f"{name} was killed: exiting"
        if not read_process_start(int(os.environ.get(TORCHRUN_PID, launcher))):  # killed before this rank came here
            exit_immediately(message, 1)
        _exit_after(launcher, lambda: exit_immediately(message, 1))


def exit_with_parent() -> None:
    """Exit this worker process when its parent ends."""
    parent = parent_process()
    assert parent is not None and parent.pid is not None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):  # Linux sends the signal when the parent's thread ends: its main thread, which iterates
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _exit_after(parent.pid, lambda: os._exit(1))


def _exit_after(parent: int, exit_fn: Callable[[], object]) -> None:
    """Call `exit_fn`, from a thread, once this process has another parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        exit_fn()

    threading.Thread(target=watch, daemon=True, name="parent").start()
