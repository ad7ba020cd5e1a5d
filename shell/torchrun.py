"""torchrun that forwards preemption signals and keeps the training's exit status.

Differences from `python -m torch.distributed.run`:

- Preemption signals are forwarded to all ranks, which take the time they need to save. torchrun itself (torch 2.14)
  would kill them after 30 seconds. The signals are blocked here and read by a thread. Ranks inherit the blocked signals
  until they call `preemption.listen()` (internvl/runtime/signals.py), so a signal in their first seconds is not lost.
- The exit status is that of the failed rank (128 + n for signal n), or 85 for an interrupted run.
- torchrun's own traceback is not printed after the error message of the failed rank.
"""

import logging
import os
import signal
import sys
import threading

import psutil

from internvl.launchers import check_master_address, make_port_in_use_error
from internvl.runtime.signals import PREEMPTED_EXIT_STATUS, PREEMPTION_SIGNALS

forwarded_signals: list[signal.Signals] = []


def forward_signals() -> None:
    """Forward every preemption signal to every rank; exit without ranks."""
    while number := signal.sigwait(PREEMPTION_SIGNALS):
        forwarded_signals.append(signal.Signals(number))
        ranks = psutil.Process().children()
        if not ranks:
            os._exit(PREEMPTED_EXIT_STATUS)
        for rank in ranks:
            rank.send_signal(number)


def main() -> None:
    # Importing torch takes seconds: block signals first. Threads and processes that start later inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    threading.Thread(target=forward_signals, daemon=True).start()
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun
    from torch.distributed.run import parse_args

    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    args = parse_args(None)
    try:
        check_master_address(args.master_addr)
        torchrun()
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        sys.exit(f"error: {make_port_in_use_error(args.master_port)}")
    except OSError as error:
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
