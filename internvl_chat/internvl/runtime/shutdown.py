"""How a rank joins the others, and how it ends: together with them, and with one message if something went wrong.

An entry point runs inside `abort_all_ranks_on_error`. What the user, the data or the machine did wrong is a
ValueError or an OSError
and told in one sentence; any other error is the program's, and shows once where it happened.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from internvl.dist_utils import init_dist, is_collective_error, timeout, world_size
from internvl.runtime.rank_monitor import ExitReport, RankMonitorClient, reports_for_rank_0
from internvl.runtime.rank_monitor_server import write_stderr
from internvl.runtime.signals import preemption

FEWER_WORKERS = "fewer --dataloader_num_workers need less"
# What ends a run though the program has no error, by class -> what to do.
ADVICE_BY_ERROR = [
    (torch.OutOfMemoryError, "smaller micro-batches or rows, --grad_checkpoint True or ZeRO-3 need less"),
    (MemoryError, FEWER_WORKERS),
]
DEAD_WORKER_ADVICE = f"a process that reads data has ended; if memory ran out, {FEWER_WORKERS} (measuring: fewer CPUs)"
rank_monitor: RankMonitorClient | None = None  # of this process, as the process group is


class RendezvousError(OSError):
    """There is no process group."""


def join_process_group(argv: Sequence[str] | None = None) -> None:
    """Join the process group that LAUNCHER, or whoever it was, started; from now on the ranks end together.

    --ddp_timeout is read ahead of the other flags, whose parser must find the process group.
    """
    global lifeline
    seconds = read_ddp_timeout(sys.argv[1:] if argv is None else argv)
    try:
        init_dist(os.environ.get("LAUNCHER"), timeout=timedelta(seconds=seconds))
    except dist.DistError as error:
        here = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RendezvousError(
            f"{here} did not find all others at {place} in {seconds} s: {first_line(error)}"
        ) from error
    if world_size() > 1:
        rank_monitor = RankMonitorClient()
        preemption.farewell = lambda: rank_monitor.leave(", as a signal told it to,")


def read_ddp_timeout(argv: Sequence[str]) -> int:
    """The value of --ddp_timeout; the default where there is none, or none that its own parser will accept."""
    if len(argv) == 1 and argv[0].endswith(".json"):
        with contextlib.suppress(OSError, ValueError):
            argv = ["--ddp_timeout", str(json.loads(Path(argv[0]).read_text()).get("ddp_timeout", ""))]
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--ddp_timeout", "--ddp-timeout", nargs="?")
    value = parser.parse_known_args(list(argv))[0].ddp_timeout or ""
    return int(value) if value.isdecimal() and int(value) > 0 else int(timeout.total_seconds())


@contextlib.contextmanager
def abort_all_ranks_on_error() -> Iterator[None]:
    """Whatever ends this rank ends the others too, and is told once; INTERNVL_TRACEBACK=1 tells where it came from."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.code, str):
            exit_with_report(ExitReport("error", error.code), 1)
        if rank_monitor is not None:
            rank_monitor.leave(f" with exit status {error.code or 0}")
        raise
    except BaseException as error:
        exit_with_report(describe_error(error), 130 if isinstance(error, KeyboardInterrupt) else 1)


def exit_with_report(report: ExitReport, status: int) -> None:
    preemption.end()  # whatever signal comes now, this end is not its
    if rank_monitor is not None:
        rank_monitor.fail(report, status)
    here = os.environ.get("RANK", "0")
    where = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f" on rank {here}"
    if report.kind == "error" or here == "0" or reports_for_rank_0():
        write_stderr(f"{report.trace}error{where}: {report.words}")
    sys.exit(status)


def describe_error(error: BaseException) -> ExitReport:
    """What to tell about an error."""
    cut = isinstance(error, RendezvousError) or is_collective_error(error)
    advice = (
        DEAD_WORKER_ADVICE
        if is_dead_dataloader_worker(error)
        else next((a for kind, a in ADVICE_BY_ERROR if isinstance(error, kind)), None)
    )
    meant = isinstance(error, (ValueError, OSError, KeyboardInterrupt)) or advice is not None
    trace = "".join(
        traceback.format_exception(type(error), error, error.__traceback__.tb_next)
    )  # without `abort_all_ranks_on_error`
    if meant and os.environ.get("INTERNVL_TRACEBACK") != "1":
        trace = ""
    if is_dead_dataloader_worker(error.__cause__):
        error = error.__cause__  # which tells the signal
    name = type(error).__name__
    # A dataloader worker's error comes with its whole trace as its text.
    text = re.sub(rf"(?ms)\ACaught \w+ in DataLoader worker .*^[\w.]*{name}: ", "", str(error)).strip()
    words = text if isinstance(error, (ValueError, OSError)) else f"{name}: {first_line(text)}".rstrip(": ")
    return ExitReport("cut" if cut else "error", f"{words.rstrip('. ')}; {advice}." if advice else words, trace)


def is_dead_dataloader_worker(error: BaseException | None) -> bool:
    """Whether a DataLoader's worker ended, by any of the errors that come of it where torch was waiting for the worker,
    was taking a tensor from it, or did something else."""
    frames = traceback.walk_tb(error.__traceback__) if isinstance(error, (ConnectionError, EOFError)) else ()
    return "DataLoader worker (pid" in str(error) or any(f.f_code.co_name == "_try_get_data" for f, _ in frames)


def first_line(error: BaseException | str) -> str:
    """Of its text, without the place in C++ that gloo and c10d put in front, and gloo's guess about the cause."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line.partition(". This is typically caused by")[0])


def leave_rank_monitor() -> None:
    """The work of this rank is done: from now on its end is no failure."""
    if rank_monitor is not None:
        rank_monitor.leave()
