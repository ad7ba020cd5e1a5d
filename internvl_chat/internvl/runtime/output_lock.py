"""Lock of an output folder: at most one run writes to it.

The lock is the file `run.lock`, created exclusively, which works on NFS as well. It names the process that holds it.
The holder sets its modification time every few seconds, and removes it on exit. A lock without a holder is replaced:

- the holder ran on this machine, and its process has ended;
- it belonged to an earlier start of the same SLURM job, or to a SLURM job that has ended;
- on other machines: its modification time is old.

    python -m internvl.runtime.output_lock FLAGS

checks, before anything is written, that no run on this machine holds the lock of --output_dir, and that no input of the
run is in that folder. Exit status 1, with a message, otherwise.
"""

import argparse
import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from internvl.arguments.run_file import expand_run_files
from internvl.command_line import INPUT_FLAGS, list_run_inputs, refuse_inputs_in_output_dir
from internvl.regular_files import read_json_object

LOCK_FILE = "run.lock"
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 90.0  # without a heartbeat; NFS clients may see a modification time a minute late


class OutputInUseError(ValueError):
    """Another run holds the lock."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        run: random identifier of the run, the same on all of its ranks.
        machine: boot and PID namespace, within which `pid` and `process_start` name a process. Containers of one host
            have different ones.
        process_start: clock ticks from boot to the start of the process, because numbers of processes are used again.
        job, job_start: SLURM job and how often it was requeued before; empty without SLURM.
        started: local time, for messages.
    """

    run: str
    host: str
    machine: str
    pid: int
    process_start: str
    job: str
    job_start: str
    started: str

    def describe(self) -> str:
        """Describe the holder and how to end it."""
        job = f", SLURM job {self.job}" if self.job else ""
        end = f"scancel {self.job}" if self.job else f"kill {self.pid} on {self.host}"
        return f"process {self.pid} on {self.host}{job}, started {self.started} (to end it: {end})"


def describe_this_process(run: str) -> Holder:
    """Describe this process as a holder."""
    return Holder(
        run=run,
        host=socket.gethostname(),
        machine=_identify_machine(),
        pid=os.getpid(),
        process_start=read_process_start(os.getpid()),
        job=os.environ.get("SLURM_JOB_ID", ""),
        job_start=os.environ.get("SLURM_RESTART_COUNT", "0") if "SLURM_JOB_ID" in os.environ else "",
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


class OutputLock:
    """Lock of a folder, held by this process until `release`.

    Args:
        on_loss_fn: called, from a thread, with a message if another run has replaced the lock. That happens only after
            this process was suspended, or cut off from the file system, for longer than `STALE_SECONDS`.

    Raises:
        OutputInUseError: another run holds it.
        OSError: the folder is not writable.
    """

    def __init__(self, folder: Path, run: str, on_loss_fn: Callable[[str], object] = print):
        self.path, self.holder, self.on_loss_fn = folder / LOCK_FILE, describe_this_process(run), on_loss_fn
        folder.mkdir(parents=True, exist_ok=True)
        self.is_owner = self._acquire()
        self._released = threading.Event()
        if self.is_owner:
            threading.Thread(target=self._beat, daemon=True, name="output-lock").start()

    def release(self) -> None:
        """Remove the lock, if this process holds it."""
        self._released.set()
        if self.is_owner and _read_holder(self.path) == self.holder:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _acquire(self) -> bool:
        """Create the lock; return False if another rank of this run has it."""
        while not self._create():
            holder = _read_holder(self.path)
            if holder is not None and holder.run == self.holder.run:
                return False
            if not _is_gone(self.path, holder, self.holder):
                raise OutputInUseError(_format_in_use(self.path, holder))
            _remove_stale(self.path, holder)
        return True

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(asdict(self.holder), file)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                holder = _read_holder(self.path)
                if holder == self.holder:
                    os.utime(self.path)
                elif holder is not None:
                    self.on_loss_fn(f"{self.path} was replaced by another run, {holder.describe()}")
                elif self.path.parent.is_dir() and not self.path.exists():  # the folder was removed and created again
                    self._create()


_lock: OutputLock | None = None  # of this process


def hold_output_lock(folder: Path, run: str, on_loss_fn: Callable[[str], object]) -> None:
    """Take the lock of a folder until this process exits."""
    global _lock
    _lock = OutputLock(folder, run, on_loss_fn)
    atexit.register(release_output_lock)


def release_output_lock() -> None:
    """Release the lock of this process, if it holds one."""
    global _lock
    if _lock is not None:
        _lock.release()
        _lock = None


def find_running_holder(folder: str | Path) -> str:
    """Describe the run on this machine that holds a folder; empty if there is none."""
    path = Path(folder, LOCK_FILE)
    holder = _read_holder(path)
    if holder is None or holder.machine != _identify_machine() or _is_process_gone(holder):
        return ""
    return _format_in_use(path, holder)


def is_lock_held(folder: str | Path) -> bool:
    """Check whether a run holds a folder: on this machine, or on another one by its last heartbeat."""
    path = Path(folder, LOCK_FILE)
    holder = _read_holder(path)
    if holder is not None and holder.machine == _identify_machine():
        return not _is_process_gone(holder)
    try:
        return time.time() - path.stat().st_mtime < STALE_SECONDS
    except FileNotFoundError:
        return False


# -- whether a holder has ended ----------------------------------------------------------------------------------------


def _is_gone(path: Path, holder: Holder | None, own: Holder) -> bool:
    """Check whether a lock has no holder any more; wait for a heartbeat if need be.

    Args:
        holder: None if the content is incomplete.
    """
    if holder is not None:
        if holder.machine == own.machine:
            return _is_process_gone(holder)
        if holder.job and (holder.job == own.job and holder.job_start != own.job_start or _is_job_gone(holder.job)):
            return True
    first = modified = _get_mtime(path)
    is_announced = False
    while modified == first and _get_server_time(path.parent) - first < STALE_SECONDS:
        if not is_announced:
            who = holder.describe() if holder else "an unknown process"
            print(f"{path} was held by {who}: waiting up to {STALE_SECONDS:.0f} s for a sign of life", flush=True)
            is_announced = True
        time.sleep(1)
        modified = _get_mtime(path)
    return modified == first or modified == 0.0


def _is_process_gone(holder: Holder) -> bool:
    return read_process_start(holder.pid) != holder.process_start


def _is_job_gone(job: str) -> bool:
    """Ask SLURM whether a job has ended; False if SLURM does not answer."""
    try:
        answer = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return False
    if answer.returncode:
        return "Invalid job id" in answer.stderr
    return not answer.stdout.strip()


def _get_mtime(path: Path) -> float:
    """Get the modification time; 0.0 if the file is gone."""
    try:
        with path.open() as file:  # NFS asks the server when a file is opened
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0


def _get_server_time(folder: Path) -> float:
    """Get the clock of the file system, which may be another machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _identify_machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # macOS
        return socket.gethostname()


def read_process_start(pid: int) -> str:
    """Read when a process started, in clock ticks; empty if it has ended, even if nobody has waited for it."""
    try:
        # The name of the program, in parentheses, may contain spaces.
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else numbers[18]


# -- the file ----------------------------------------------------------------------------------------------------------


def _read_holder(path: Path) -> Holder | None:
    """Read a lock; None if it does not exist or is not complete."""
    try:
        holder = Holder(**read_json_object(path))
        return replace(holder, pid=int(holder.pid), job=str(holder.job))
    except (OSError, ValueError, TypeError):
        return None


def _remove_stale(path: Path, holder: Holder | None) -> None:
    """Remove a lock without a holder, but not that of a run which has just done the same."""
    removed = path.with_name(f"{LOCK_FILE}.{socket.gethostname()}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, removed)
        if _read_holder(removed) != holder:
            os.rename(removed, path)
        else:
            removed.unlink()


def _format_in_use(path: Path, holder: Holder | None) -> str:
    who = holder.describe() if holder else "a process that has not written its name"
    return (
        f"--output_dir {path.parent} is in use by another run: {who}. Wait for its end, or choose another folder; "
        f"if that process does not exist, remove {path}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("output_dir", *INPUT_FLAGS):
        parser.add_argument(f"--{flag}", default="")
    try:
        args = vars(parser.parse_known_args(expand_run_files(sys.argv[1:]))[0])
        refuse_inputs_in_output_dir(args["output_dir"], list_run_inputs(args))
        if message := find_running_holder(args["output_dir"]):
            raise OutputInUseError(message)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
