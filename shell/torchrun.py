"""torchrun, with the training's own exit status and without a page of traceback below the training's own message.

Signals that tell a run to leave go on to its processes, which take the time they need to save: torch's own way kills
them after 30 seconds. They are blocked here and taken up by a thread. Processes inherit that until they listen, so that
a signal in their first seconds waits, too.
"""

import logging
import os
import signal
import sys
import threading

import psutil

from internvl.launchers import check_address, port_in_use_error
from internvl.runtime.signals import PREEMPTED_EXIT_STATUS, SIGNALS

told: list[signal.Signals] = []  # what has been passed on


def pass_on() -> None:
    """Every signal to every process of the run; before there are any, end."""
    while number := signal.sigwait(SIGNALS):
        told.append(signal.Signals(number))
        processes = psutil.Process().children()
        if not processes:
            os._exit(PREEMPTED_EXIT_STATUS)
        for process in processes:
            process.send_signal(number)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=pass_on, daemon=True).start()
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun
    from torch.distributed.run import parse_args

    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    asked = parse_args(None)
    try:
        check_address(asked.master_addr)
        torchrun()
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        sys.exit(f"error: {port_in_use_error(asked.master_port)}")
    except OSError as error:
        sys.exit(f"error: {error}")
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # One rank that left at once may have broken another one's exchange of data.
        if told and PREEMPTED_EXIT_STATUS in {one.exitcode for one in error.failures.values()}:
            sys.exit(PREEMPTED_EXIT_STATUS)
        if failure.exitcode < 0:  # it could not say anything itself
            print(f"\nerror: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


if __name__ == "__main__":
    main()
