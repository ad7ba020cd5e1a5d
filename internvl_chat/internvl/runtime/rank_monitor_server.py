"""Server of the rank monitor: collects exit reports, names failed ranks.

The protocol is described in `rank_monitor.py`.
"""

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from typing import NamedTuple

from internvl.runtime.console import write_console

# Kinds of exit reports, the best explanation of a failed run first -> seconds to wait for a better explanation.
# None: the report does not end the run, because a rank may finish while others still write files.
GRACE_SECONDS = {"error": 2.0, "killed": 0.5, "exit": None, "collective_failed": 2.0, "done": None}
HANDSHAKE_TIMEOUT = 10.0  # seconds for a new connection to identify itself
MAX_HANDSHAKE_BYTES = 200
SEND_TIMEOUT = 30.0  # seconds until sending to a rank that does not read fails
KILLED_MESSAGE = "exited without an error report; probably killed (out-of-memory killer?)"
MONITOR_THREAD_PREFIX = "rank-monitor"  # of the names of both threads, which the watchdog leaves out of its stacks


class ExitReport(NamedTuple):
    """Why a rank exits.

    Attributes:
        kind: a key of `GRACE_SECONDS`, explained in `rank_monitor.py`.
        message: one sentence; for `exit` what completes "rank 1 exited", such as "with exit status 3".
        traceback: lines printed above the message; empty where the message is enough.
    """

    kind: str
    message: str = ""
    traceback: str = ""


class RankMonitorServer(threading.Thread):
    """Thread of rank 0 that listens to all ranks.

    Args:
        listener: socket that the ranks connect to; closed once all have.
        num_ranks: world size.
        secret: what a connection must send to be accepted as a rank.
        connect_timeout: seconds for all ranks to connect.

    Raises:
        OSError: not all ranks connected in time.
    """

    def __init__(self, listener: socket.socket, num_ranks: int, secret: str, connect_timeout: float):
        super().__init__(name=f"{MONITOR_THREAD_PREFIX}-server", daemon=True)
        self.connections: dict[int, socket.socket] = {}
        self.buffers: dict[int, bytes] = dict.fromkeys(range(num_ranks), b"")  # by rank, an incomplete line
        self.reports: dict[int, ExitReport] = {}
        self.deadline: float | None = None  # when the run is aborted; None while nothing failed
        connect_deadline = time.monotonic() + connect_timeout
        with listener:
            while len(self.connections) < num_ranks:
                listener.settimeout(max(0.01, connect_deadline - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError as error:
                    missing = format_ranks([rank for rank in range(num_ranks) if rank not in self.connections])
                    raise OSError(f"{missing} did not connect to rank 0 within {connect_timeout:.0f} s") from error
                if (rank := identify_rank(connection, secret)) is None:
                    connection.close()
                else:
                    self.connections[rank] = connection

    def run(self) -> None:
        """Receive reports until the run is decided; broadcast the decision."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in self.connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while not self.is_decided():
                remaining = None if self.deadline is None else max(0, self.deadline - time.monotonic())
                for key, _ in selector.select(remaining):
                    if not self.receive(key.data):
                        selector.unregister(self.connections[key.data])
        if self.deadline is None:
            self.broadcast({"rank_0_exited": self.reports[0].message})
        else:
            failed_ranks, message = self.explain_failure()
            if message:
                write_stderr(message)
            self.broadcast({"abort": failed_ranks})

    def is_decided(self) -> bool:
        """Check whether the run is aborted, or rank 0 exits."""
        if self.deadline is None:
            return 0 in self.reports
        return len(self.reports) == len(self.connections) or time.monotonic() >= self.deadline

    def receive(self, rank: int) -> bool:
        """Read what a rank sent; return False once its connection is closed."""
        try:
            received = self.connections[rank].recv(1 << 16)
        except OSError:  # reset by the other side
            received = b""
        *lines, self.buffers[rank] = (self.buffers[rank] + received).split(b"\n")
        for line in lines:
            self.record_report(rank, ExitReport(**json.loads(line)))
        if not received and rank not in self.reports:
            self.record_report(rank, ExitReport("killed"))
        return bool(received)

    def record_report(self, rank: int, report: ExitReport) -> None:
        """Keep a rank's first report; a failure sets the deadline."""
        self.reports.setdefault(rank, report)
        if (grace_seconds := GRACE_SECONDS[report.kind]) is not None:
            self.deadline = min(self.deadline or float("inf"), time.monotonic() + grace_seconds)

    def explain_failure(self) -> tuple[list[int], str]:
        """Choose the best report.

        Returns:
            The ranks at fault, and the message; an empty message where torchrun prints a better one.
        """
        kind = min((report.kind for report in self.reports.values()), key=list(GRACE_SECONDS).index)
        ranks = sorted(rank for rank, report in self.reports.items() if report.kind == kind)
        if kind == "collective_failed":
            # A rank whose collective times out breaks those of the ranks that wait with it: its message explains more.
            ranks.sort(key=lambda rank: "timed out" not in self.reports[rank].message.lower())
        report = self.reports[ranks[0]]
        if kind == "error":
            reports = [self.reports.get(rank) for rank in self.connections]
            is_on_all_ranks = all(other is not None and other.message == report.message for other in reports)
            return ranks, format_error(report, None if is_on_all_ranks else ranks[0])
        if kind == "killed":  # torchrun knows the signal
            return ranks, "" if is_started_by_torchrun() else f"error: {format_ranks(ranks)} {KILLED_MESSAGE}"
        if kind == "exit":
            return ranks, f"error: {format_ranks(ranks)} exited {report.message} while other ranks were still training"
        silent_ranks = sorted(self.connections.keys() - self.reports.keys())
        done_ranks = sorted(rank for rank, other in self.reports.items() if other.kind == "done")
        if absent_ranks := silent_ranks or done_ranks:
            what = "did not join" if silent_ranks else "exited and did not join"
            waiting = f"a collective that rank {ranks[0]} waited for: {report.message}"
            return absent_ranks, f"error: {format_ranks(absent_ranks)} {what} {waiting}"
        return ranks, format_error(report, ranks[0])

    def broadcast(self, message: dict) -> None:
        """Send a message to all ranks that are left."""
        for rank in sorted(self.connections, reverse=True):  # rank 0 last: it may exit as soon as it has read it
            with contextlib.suppress(OSError):  # that rank is gone
                self.connections[rank].sendall(json.dumps(message).encode() + b"\n")

    def close_connections(self) -> None:
        """Close this process's copies of the sockets, without ending the connections."""
        for connection in self.connections.values():
            os.close(connection.detach())


def identify_rank(connection: socket.socket, secret: str) -> int | None:
    """Read the handshake of a connection; None without the secret."""
    connection.settimeout(HANDSHAKE_TIMEOUT)
    try:
        line = b""
        while not line.endswith(b"\n") and len(line) < MAX_HANDSHAKE_BYTES:
            if not (received := connection.recv(1)):
                return None
            line += received
        handshake = json.loads(line)
    except (OSError, ValueError):
        return None
    connection.settimeout(SEND_TIMEOUT)
    return handshake["rank"] if isinstance(handshake, dict) and handshake.get("secret") == secret else None


def is_started_by_torchrun() -> bool:
    """Check whether torchrun's agent watches the ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def format_ranks(ranks: list[int]) -> str:
    """Format as `rank 3` or `ranks 1, 2`."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def format_error(report: ExitReport, rank: int | None) -> str:
    """Format a report for stderr.

    Args:
        rank: the failed rank; None if there is only one, or if all failed alike.
    """
    failed = "" if rank is None else f"rank {rank} failed: "
    return f"{report.traceback}error: {failed}{report.message}"


def write_stderr(text: str) -> None:
    """Write text to stderr, on separate lines, in one piece."""
    # The leading newline ends a progress bar.
    write_console(2, f"\n{text}\n")
