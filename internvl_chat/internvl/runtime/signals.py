"""What SIGUSR1, SIGTERM and Ctrl-C do to a process of a run: it ends its step, saves, and leaves with status 85.

An entry point calls `listen` before it imports torch, which takes seconds. Until the first step a signal ends the
process at once; from then on it is noted here, and `stopping.py` acts on it where all ranks are at the same place.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time

PREEMPTED_EXIT_STATUS = 85  # exit status: the run was told to leave, and the same command goes on with it
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class PreemptionListener:
    """What this process was told, and since when.

    A signal's own handler runs only when the main thread is back in Python, which a step on a GPU or a collective can
    keep it from for minutes. So handlers do nothing, and a thread reads which signals came from the wake-up pipe.
    """

    def __init__(self):
        self.listening = self.training = self.over = False
        self.signal: signal.Signals | None = None
        self.heard_at = 0.0  # of time.monotonic()
        self.bound = 0.0  # seconds from the signal to the end of the process, 0 for as long as it takes
        self.farewell = lambda: None  # tells the other ranks that this one leaves (ending.py)
        self.goes_on_from = ""  # what the last line of a run that runs out of time says

    def listen(self) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _noted)
        os.register_at_fork(after_in_child=_let_children_be)
        threading.Thread(target=self._watch, args=(read_end,), daemon=True, name="signals").start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # shell/torchrun.py holds them back until somebody listens
        self.listening = True

    def begin(self, bound: float) -> None:
        """The first step comes: from now on signals are noted.

        Args:
            bound: how many seconds behind a signal the process ends in any case; 0 for no bound.
        """
        self.bound, self.training = bound, True

    def end(self) -> None:
        """The last step, or the last save, is done: what is left takes its time, whatever is heard."""
        self.over = True

    @property
    def waited(self) -> float:
        """Seconds since the signal; negative if there was none."""
        return time.monotonic() - self.heard_at if self.signal else -1.0

    def _watch(self, read_end: int) -> None:
        while number := os.read(read_end, 1):
            if number[0] in SIGNALS and not self.over:
                self._hear(signal.Signals(number[0]))

    def _hear(self, number: signal.Signals) -> None:
        if not self.training:
            told = f"{number.name} before the first step: nothing to save; the same command starts again"
            exit_now(told, exit_status_of(number))
        elif self.signal is None:
            self.note(number, time.monotonic())
        elif number == signal.SIGINT and self.waited > 1:  # Ctrl-C, once more
            exit_now(f"{number.name} again: leaving without saving", 128 + number)

    def note(self, number: signal.Signals, heard_at: float) -> None:
        """That a signal came to this rank, or to another."""
        self.signal, self.heard_at = number, heard_at
        if self.bound:
            timer = threading.Timer(max(0.0, heard_at + self.bound - time.monotonic()), self._out_of_time)
            timer.daemon = True
            timer.start()

    def _out_of_time(self) -> None:
        if not self.over:
            exit_now(
                f"{self.signal.name}: the {self.bound:g} s of --save_on_signal_seconds are over before a checkpoint is "
                f"whole; {self.goes_on_from}",
                exit_status_of(self.signal),
            )


preemption = PreemptionListener()  # signals are a process's, and so is this


def exit_status_of(number: signal.Signals) -> int:
    """What a run that could not save leaves with. srun sends SIGTERM also when another task failed, and returns the
    highest status: it must not look as if the same command could go on."""
    return 128 + number if number == signal.SIGTERM and os.environ.get("LAUNCHER") == "slurm" else PREEMPTED_EXIT_STATUS


def exit_now(sentence: str, status: int) -> None:
    """End the process from any thread, whatever the others do; rank 0 says why."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        os.write(sys.stdout.fileno(), f"{sentence} (exit status {status})\n".encode())
    preemption.farewell()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


def ignore_signals() -> None:
    """The status is decided: while Python ends, a signal would replace it, such as srun's once a task has left."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _noted(number: int, frame) -> None:
    pass


def _let_children_be() -> None:
    """In a child: what was sent to all processes of a run is for the one that trains to act on."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def ignore_first_sigterm(worker: int) -> None:
    """Where a worker of a dataloader starts: it may be told to end together with the run, which needs its data until
    the step is done. The second SIGTERM is meant: the dataloader's own."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
