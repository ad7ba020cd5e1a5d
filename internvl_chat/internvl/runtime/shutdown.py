"""Start and exit all ranks together, with one message for a failure.

An entry point runs inside `abort_all_ranks_on_error`. Errors of the user, the data or the machine are a ValueError or
an OSError and are printed in one line. Any other error is a bug and is printed with its traceback.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from internvl.arguments.run_file import expand_run_files, is_json_file
from internvl.data.outages import StoreUnavailableError
from internvl.dist_utils import get_world_size, init_dist, is_collective_error, timeout
from internvl.runtime.rank_monitor import RankMonitorClient, reports_for_rank_0
from internvl.runtime.rank_monitor_server import ExitReport, format_error, write_stderr
from internvl.runtime.signals import PREEMPTED_EXIT_STATUS, ignore_signals, kill_workers, preemption
from internvl.torch_internals import destroy_process_groups, is_raised_in_dataloader_wait

# Errors that are not bugs, by class -> advice.
ADVICE_BY_ERROR = [
    (
        torch.OutOfMemoryError,
        "to use less memory: smaller micro-batches or packed sequences, --grad_checkpoint True, or ZeRO-3",
    ),
    (MemoryError, "to use less memory: fewer --dataloader_num_workers"),
    (subprocess.CalledProcessError, "DeepSpeed compiles an op: set CXX to a C++ compiler (apt-get install g++)"),
]
# The same for errors without a class of their own, by a pattern of their text.
ADVICE_BY_TEXT = [
    (r"can't allocate memory|bad_alloc|Cannot allocate memory", "memory is full, or limited by `ulimit -v`"),
    (r"can't start new thread|pthread_create", "raise the limit `ulimit -u`, or set a lower OMP_NUM_THREADS"),
    (r"Too many open files", "raise the limit `ulimit -n`"),
]
DEAD_WORKER_ADVICE = (
    "a DataLoader worker died; if memory ran out: fewer --dataloader_num_workers (while measuring lengths: fewer CPUs)"
)
monitor_client: RankMonitorClient | None = None  # one per process, like the default process group


class RendezvousError(OSError):
    """Failure to form the process group."""


def join_process_group(argv: Sequence[str] | None = None) -> None:
    """Join the launcher's process group and start the rank monitor.

    Args:
        argv: the command line, by default this process's. --ddp_timeout is read from it before all other flags,
            because TrainingArguments requires the process group.

    Raises:
        RendezvousError: not all ranks connected within --ddp_timeout.
    """
    global monitor_client
    seconds = read_ddp_timeout(sys.argv[1:] if argv is None else argv)
    try:
        init_dist(os.environ.get("LAUNCHER"), timeout=timedelta(seconds=seconds))
    except dist.DistError as error:
        this_rank = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RendezvousError(
            f"{this_rank}: not all ranks connected to {address} within {seconds} s: {extract_first_line(error)}"
        ) from error
    if get_world_size() > 1:
        monitor_client = RankMonitorClient()
        preemption.before_exit_fn = lambda: monitor_client.leave("on a preemption signal")


def read_ddp_timeout(argv: Sequence[str]) -> int:
    """Read --ddp_timeout in seconds; the default if it is missing or invalid.

    An invalid value is rejected later, by the parser of all flags.
    """
    with contextlib.suppress(OSError, ValueError):
        if is_json_file(argv):
            argv = ["--ddp_timeout", str(json.loads(Path(argv[0]).read_text()).get("ddp_timeout", ""))]
        argv = expand_run_files(argv)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--ddp_timeout", "--ddp-timeout", nargs="?")
    value = parser.parse_known_args(list(argv))[0].ddp_timeout or ""
    return int(value) if value.isdecimal() and int(value) > 0 else int(timeout.total_seconds())


@contextlib.contextmanager
def abort_all_ranks_on_error() -> Iterator[None]:
    """Exit all ranks, with one message, when this rank fails.

    INTERNVL_TRACEBACK=1 prints a traceback for every error.
    """
    try:
        yield
    except SystemExit as error:
        if isinstance(error.code, str):
            exit_with_report(ExitReport("error", error.code), 1)
        if monitor_client is not None:
            monitor_client.leave(f"with exit status {error.code or 0}")
        raise
    except BaseException as error:
        statuses = {KeyboardInterrupt: 130, StoreUnavailableError: PREEMPTED_EXIT_STATUS}  # the latter may be restarted
        status = next((status for kind, status in statuses.items() if isinstance(error, kind)), 1)
        exit_with_report(make_exit_report(error), status)


def exit_with_report(report: ExitReport, exit_status: int) -> None:
    """Report a failure to all ranks and exit.

    Without a rank monitor (one rank, or no process group yet) this rank prints it.
    """
    preemption.ignore_further_signals()  # a later signal must not replace the exit status
    if monitor_client is not None:
        monitor_client.report_failure(report, exit_status)
    rank = os.environ.get("RANK", "0")
    is_only_rank = os.environ.get("WORLD_SIZE", "1") == "1"
    if report.kind == "error" or rank == "0" or reports_for_rank_0():
        write_stderr(format_error(report, None if is_only_rank else int(rank)))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error about a killed worker
    kill_workers()  # Python would wait for them
    sys.exit(exit_status)


def make_exit_report(error: BaseException) -> ExitReport:
    """Describe an error in one sentence, with advice if there is any.

    A traceback is included only for bugs, or with INTERNVL_TRACEBACK=1.
    """
    is_collective = isinstance(error, RendezvousError) or is_collective_error(error)
    if is_dead_dataloader_worker(error):
        advice = DEAD_WORKER_ADVICE
    else:
        matching = [text for kind, text in ADVICE_BY_ERROR if isinstance(error, kind)]
        matching += [text for pattern, text in ADVICE_BY_TEXT if re.search(pattern, str(error))]
        advice = next(iter(matching), None)
    is_bug = advice is None and not isinstance(error, (ValueError, OSError, KeyboardInterrupt))
    trace = ""
    if is_bug or os.environ.get("INTERNVL_TRACEBACK") == "1":
        # Without the frame of `abort_all_ranks_on_error`.
        outer_frame = error.__traceback__ and error.__traceback__.tb_next
        trace = "".join(traceback.format_exception(type(error), error, outer_frame))
    if error.__cause__ is not None and is_dead_dataloader_worker(error.__cause__):
        error = error.__cause__  # raised by torch's signal handler; it names the signal
    name = type(error).__name__
    # torch puts the traceback of a DataLoader worker's error into its text (ExceptionWrapper): keep the last part.
    text = re.sub(rf"(?ms)\ACaught \w+ in DataLoader worker .*^[\w.]*{name}: ", "", str(error)).strip()
    message = text if isinstance(error, (ValueError, OSError)) else f"{name}: {extract_first_line(text)}".rstrip(": ")
    if advice:
        message = f"{message.rstrip('. ')}; {advice}."
    return ExitReport("collective_failed" if is_collective else "error", message, trace)


def is_dead_dataloader_worker(error: BaseException | None) -> bool:
    """Check whether an error means that a DataLoader worker died.

    torch's signal handler raises an error with the worker's pid. While torch receives a tensor from the worker, it is a
    connection error instead.
    """
    if isinstance(error, (ConnectionError, EOFError)) and is_raised_in_dataloader_wait(error):
        return True
    return "DataLoader worker (pid" in str(error)


def extract_first_line(error: BaseException | str) -> str:
    """Extract the first line of an error's text.

    Removes the prefix `[file.cc:12] ` of gloo and c10d (torch 2.14), and gloo's guess about the cause.
    """
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line.partition(". This is typically caused by")[0])


def leave_rank_monitor() -> None:
    """Report that this rank has finished without an error."""
    if monitor_client is not None:
        monitor_client.leave()


def exit_process_group(status: int) -> None:
    """Destroy the process group and exit.

    While threads of the group are alive, the exit of Python occasionally aborts.
    """
    leave_rank_monitor()
    gc.collect()  # no object may refer to the group any more
    destroy_process_groups()
    if status:
        ignore_signals()
        sys.exit(status)
