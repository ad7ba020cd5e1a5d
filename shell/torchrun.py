"""torchrun that forwards preemption signals and keeps the training's exit status.

Differences from `python -m torch.distributed.run`:

- Preemption signals are forwarded to all ranks, which take the time they need to save. torchrun itself (torch 2.14)
  would kill them after 30 seconds. The signals are blocked here and read by a thread. Ranks inherit the blocked signals
  until they call `preemption.listen()` (internvl/runtime/signals.py), so a signal in their first seconds is not lost.
- The exit status is that of the failed rank (128 + n for signal n), or 85 for an interrupted run.
- torchrun's own traceback is not printed after the error message of the failed rank.
- Invalid variables, and other nodes that are missing, are reported in one line.
"""

import logging
import os
import signal
import sys
import threading

import psutil

from internvl.launchers import (
    DEFAULT_PORT,
    announce_waiting,
    check_master_address,
    describe_connected_hosts,
    make_port_in_use_error,
    validate_environment,
    validate_port,
    wait_for_rank_0,
)
from internvl.runtime.console import protect_console
from internvl.runtime.parent import TORCHRUN_PID
from internvl.runtime.signals import PREEMPTED_EXIT_STATUS, PREEMPTION_SIGNALS, list_handled_signals

MASTER_TIMEOUT = 600.0  # seconds to wait for rank 0's node, as torch does
forwarded_signals: list[signal.Signals] = []


def forward_signals(signals: list[signal.Signals]) -> None:
    """Forward every preemption signal to every rank; exit without ranks."""
    while number := signal.sigwait(PREEMPTION_SIGNALS):
        if number not in signals:  # nohup: ignored
            continue
        forwarded_signals.append(signal.Signals(number))
        ranks = psutil.Process().children()
        if not ranks:
            os._exit(PREEMPTED_EXIT_STATUS)
        for rank in ranks:
            rank.send_signal(number)


def connect_nodes(args) -> None:
    """Check the address of rank 0's node, and wait for that node.

    Raises:
        ValueError: an argument is invalid.
        OSError: the address is unknown, or the node cannot be reached.
    """
    args.master_port = args.master_port or int(DEFAULT_PORT)
    validate_port("--master_port", str(args.master_port))
    check_master_address(args.master_addr)
    if not args.nnodes.isdecimal():  # torch's elastic range MIN:MAX
        return
    if not 0 <= args.node_rank < int(args.nnodes):
        raise ValueError(f"--node_rank {args.node_rank} is invalid: expected less than --nnodes {args.nnodes}.")
    if args.node_rank > 0 and args.rdzv_backend == "static" and not args.rdzv_endpoint:
        node = f"node {args.node_rank} of {args.nnodes} ({os.uname().nodename})"
        wait_for_rank_0(args.master_addr, args.master_port, MASTER_TIMEOUT, node)


def describe_missing_nodes(args) -> str:
    """Describe which nodes this one waits for; empty once ranks have started."""
    if psutil.Process().children():
        return ""
    connected = f"; {describe_connected_hosts(args.master_port)}" if args.node_rank == 0 else ""
    return f"node {args.node_rank} ({os.uname().nodename}) waits for all {args.nnodes} nodes to start{connected}"


def main() -> None:
    protect_console()
    # Importing torch takes seconds: block signals first. Threads and processes that start later inherit the mask.
    signals = list_handled_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    threading.Thread(target=forward_signals, args=(signals,), daemon=True).start()
    os.environ[TORCHRUN_PID] = str(os.getpid())
    try:
        validate_environment(os.environ)
    except ValueError as error:
        sys.exit(f"error: {error}")
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun
    from torch.distributed.run import parse_args

    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    argv = sys.argv[1:]
    if signal.SIGHUP not in signals:  # torch would install a handler, which ranks do not inherit
        argv = ["--signals_to_handle=SIGTERM,SIGINT,SIGQUIT", *argv]
    args = parse_args(argv)
    try:
        connect_nodes(args)
        with announce_waiting(lambda: describe_missing_nodes(args)):
            torchrun(argv)
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        sys.exit(f"error: {make_port_in_use_error(args.master_port)}")
    except DistStoreError:
        sys.exit(f"error: {describe_missing_nodes(args)}: giving up.")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # A rank that exits on the signal can break a collective of another one, which then fails first.
        if forwarded_signals and PREEMPTED_EXIT_STATUS in {failed.exitcode for failed in error.failures.values()}:
            sys.exit(PREEMPTED_EXIT_STATUS)
        if failure.exitcode < 0:  # killed by a signal: the rank itself could print nothing
            print(f"\nerror: rank {rank} was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


if __name__ == "__main__":
    main()
