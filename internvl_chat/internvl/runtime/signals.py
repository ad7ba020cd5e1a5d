"""Preemption signals: SIGUSR1, SIGTERM, Ctrl-C and a closed terminal (SIGHUP) stop a run gracefully.

Before the first step a signal ends the process immediately. From then on `preemption` records it. At the end of each
step the trainer combines the signals of all ranks. After a signal it saves a checkpoint and exits with status 85, and
the same command resumes the run. An entry point calls `preemption.listen()` before it imports torch, which takes
seconds.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from internvl.runtime.console import write_console
from internvl.runtime.output_lock import release_output_lock

PREEMPTED_EXIT_STATUS = 85  # the run was interrupted, and the same command resumes it
PREEMPTION_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RELEASE_SECONDS = 5.0


class PreemptionListener:
    """Recorder of this process's preemption signals.

    Python runs a signal's handler only once the main thread is back in Python, which a GPU step or a collective can
    delay for minutes. Therefore the handlers do nothing, and a thread reads the signal numbers from Python's wake-up
    file descriptor.

    Attributes:
        signal: the first signal after the first step began, of this or another rank; None without one.
        before_exit_fn: called before an immediate exit; disconnects from the rank monitor.
        resume_hint: end of the message when the time limit is exceeded, such as "the same command resumes from ...".
    """

    def __init__(self):
        self.is_training = self.is_finished = False
        self.signal: signal.Signals | None = None
        self.received_at = 0.0  # time.monotonic()
        self.grace_seconds = 0.0
        self.before_exit_fn: Callable[[], None] = lambda: None
        self.resume_hint = ""
        self.max_data_wait = 60.0
        self._data_wait_start: float | None = None

    def listen(self) -> None:
        """Install the signal handlers and start the thread that reads the signals."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)  # required by set_wakeup_fd
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in list_handled_signals():
            signal.signal(number, _do_nothing)
        os.register_at_fork(after_in_child=_reset_signals_in_child)
        threading.Thread(target=self._read_signals, args=(read_end,), daemon=True, name="signals").start()
        # shell/torchrun.py starts ranks with these signals blocked.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PREEMPTION_SIGNALS)

    def start_training(self, grace_seconds: float, max_data_wait: float = 60.0) -> None:
        """Start to record signals instead of exiting immediately.

        Args:
            grace_seconds: time limit from a signal to the exit of the process; 0 for no limit.
            max_data_wait: seconds after a signal that a step may still wait for data.
        """
        self.grace_seconds, self.max_data_wait = grace_seconds, max_data_wait
        self.is_training = True

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Mark a wait for data, which may never end.

        Workers may wait for a file system that does not respond.
        """
        self._data_wait_start = time.monotonic()
        try:
            yield
        finally:
            self._data_wait_start = None

    def ignore_further_signals(self) -> None:
        """Ignore signals and the time limit while the run ends."""
        self.is_finished = True

    @property
    def seconds_since_signal(self) -> float:
        """Seconds since the signal; -1 without one."""
        return time.monotonic() - self.received_at if self.signal else -1.0

    def record_signal(self, number: signal.Signals, received_at: float) -> None:
        """Set `signal`, this or another rank's, and start the time limit.

        Args:
            received_at: seconds of `time.monotonic()`.
        """
        self.signal, self.received_at = number, received_at
        threading.Thread(target=self._exit_if_data_stalls, daemon=True, name="data-wait").start()
        if self.grace_seconds:
            timer = threading.Timer(
                max(0.0, received_at + self.grace_seconds - time.monotonic()), self._exit_on_time_limit
            )
            timer.daemon = True
            timer.start()

    def _read_signals(self, read_end: int) -> None:
        while number := os.read(read_end, 1):
            if number[0] in PREEMPTION_SIGNALS and not self.is_finished:
                self._handle_signal(signal.Signals(number[0]))

    def _handle_signal(self, number: signal.Signals) -> None:
        if not self.is_training:
            message = (
                f"{number.name} received before the first step: nothing to save; run the same command to start again"
            )
            exit_immediately(message, choose_exit_status(number))
        elif self.signal is None:
            self.record_signal(number, time.monotonic())
        elif number == signal.SIGINT and self.seconds_since_signal > 1:  # the user pressed Ctrl-C again
            exit_immediately(f"{number.name} received again: exiting without saving", 128 + number)

    def _exit_if_data_stalls(self) -> None:
        """Exit once a step has waited `max_data_wait` seconds for data since the signal."""
        assert self.signal is not None
        while not self.is_finished:
            start = self._data_wait_start
            if start is not None and time.monotonic() - max(start, self.received_at) > self.max_data_wait:
                message = f"{self.signal.name}: no data for {time.monotonic() - start:.0f} s, exiting without saving"
                exit_immediately(f"{message}; {self.resume_hint}", choose_exit_status(self.signal), is_own=True)
            time.sleep(0.2)

    def _exit_on_time_limit(self) -> None:
        if not self.is_finished:
            assert self.signal is not None  # the timer starts with the signal
            exit_immediately(
                f"{self.signal.name}: --save_on_signal_seconds {self.grace_seconds:g} elapsed before a checkpoint was "
                f"saved; {self.resume_hint}",
                choose_exit_status(self.signal),
            )


preemption = PreemptionListener()  # one per process, as signals are


def choose_exit_status(number: signal.Signals) -> int:
    """Choose the exit status of a run that could not save.

    srun also sends SIGTERM if another task has failed, and returns the highest status of all tasks. Status 85 would
    hide the failure.
    """
    is_slurm_task = os.environ.get("LAUNCHER") == "slurm"
    return 128 + number if number == signal.SIGTERM and is_slurm_task else PREEMPTED_EXIT_STATUS


def exit_immediately(message: str, exit_status: int, is_own: bool = False) -> None:
    """Exit immediately, from any thread.

    Args:
        message: printed by rank 0.
        is_own: the message is about this rank, which prints it.
    """
    if is_own or is_rank_0():
        prefix = f"rank {os.environ['RANK']}: " if is_own and os.environ.get("WORLD_SIZE", "1") != "1" else ""
        write_console(1, f"{prefix}{message} (exit status {exit_status})\n")
    preemption.before_exit_fn()
    exit_process(exit_status)


def is_rank_0() -> bool:
    """Check the variables of launchers, which are known before the process group."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("OMPI_COMM_WORLD_RANK", "0"))) == "0"


def kill_workers() -> None:
    """Kill this process's workers, which ignore the first SIGTERM."""
    for child in multiprocessing.active_children():
        child.kill()


def exit_process(exit_status: int) -> None:
    """End this process and its workers without Python's clean-up, which may wait for other threads."""
    kill_workers()
    release = threading.Thread(target=release_output_lock, daemon=True)
    release.start()
    release.join(RELEASE_SECONDS)  # the file system may not respond
    os._exit(exit_status)


def list_handled_signals() -> list[signal.Signals]:
    """List the preemption signals; without SIGHUP if nohup has ignored it."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in PREEMPTION_SIGNALS if not (is_ignored and number == signal.SIGHUP)]


def ignore_signals() -> None:
    """Ignore preemption signals while Python exits.

    A signal would replace the exit status. srun, for example, sends SIGTERM once another task has exited.
    """
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def ignore_first_sigterm(worker_id: int) -> None:
    """Ignore one SIGTERM in a DataLoader worker (a `worker_init_fn`).

    The first may have been sent to all processes of the run, which needs the worker to finish its step. The second is
    the DataLoader's and terminates the worker.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _do_nothing(number: int, frame) -> None:
    pass


def _reset_signals_in_child() -> None:
    """Ignore preemption signals in a forked child, except SIGTERM.

    Only the rank itself handles signals that are sent to all processes of a run.
    """
    signal.set_wakeup_fd(-1)
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
