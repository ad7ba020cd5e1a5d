"""Rank monitor: a connection from every rank to rank 0.

It detects failed ranks. Collectives are not enough: when a rank fails, gloo raises an error only on the ranks that
communicate with it, NCCL waits until its timeout, and neither names the failed rank. With the monitor all ranks exit
within seconds, and rank 0 prints one message that names the failed rank. `shutdown.py` starts the client after
`init_dist` and reports to it.

Protocol: JSON objects, one per line. Rank 0 runs a server thread and is a client as well.

    client -> server, on connecting      {"rank": 1, "secret": "..."}
    client -> server, once, on exit      {"kind": "error", "message": "...", "traceback": "..."}
    server -> all clients, once          {"abort": [1]}: the run failed, because of these ranks
                                         {"rank_0_exited": "with exit status 3"}: rank 0 exits first, without an error

Kinds of reports, the best explanation of a failed run first:

    error               this rank's program, data or machine failed
    killed              never sent: the server's record of a connection that closed without a report
    exit                the program exits early, with an exit status or on a signal
    collective_failed   a collective failed, perhaps because of another rank
    done                this rank's work is complete

`error`, `killed` and `collective_failed` abort the run, after a grace period in which a better explanation may arrive
(`GRACE_SECONDS`: 0.5 to 2 s). A client that reports a failure waits `REPLY_TIMEOUT` for the decision. A client whose
connection closes without a decision knows that rank 0 was killed. All clients exit with `os._exit`.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import weakref
from typing import Any

from internvl.dist_utils import get_rank, get_world_size, run_on_rank_0
from internvl.runtime.rank_monitor_server import (
    KILLED_MESSAGE,
    MONITOR_THREAD_PREFIX,
    ExitReport,
    RankMonitorServer,
    format_error,
    is_started_by_torchrun,
    write_stderr,
)
from internvl.runtime.signals import exit_process

CONNECT_TIMEOUT = 60.0  # seconds for all ranks to connect
REPLY_TIMEOUT = 10.0  # seconds to wait for rank 0's decision
# Seconds until a rank exits that has not failed itself. torchrun's agent takes the exit status of the rank that exits
# first, and kills the others itself: the failed rank must be first.
EXIT_DELAY, EXIT_DELAY_TORCHRUN = 0.5, 2.0
LOST_SERVER_DELAY = 0.5  # seconds until rank 0 is reported as killed: the same signal may be about to end this rank


class RankMonitorClient:
    """This rank's connection to the rank monitor.

    The constructor is a collective; the world must have at least 2 ranks.
    """

    def __init__(self):
        assert get_world_size() > 1
        listener: Any = open_listener() if get_rank() == 0 else None
        port, secret = run_on_rank_0(lambda: (listener.getsockname()[1], os.urandom(16).hex()))
        self.connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_TIMEOUT)
        self.connection.settimeout(None)
        enable_keepalive(self.connection)
        self.decision_received = threading.Event()  # also set if rank 0 exits without a decision
        self.failed_ranks: list[int] = []
        self.exit_status = 1  # this rank's, if the run is aborted
        self.rank_0_exit_reason: str | None = None  # set if rank 0 exits first, without an error
        self.send({"rank": get_rank(), "secret": secret})
        self.server = None
        if listener is not None:
            self.server = RankMonitorServer(listener, get_world_size(), secret, CONNECT_TIMEOUT)
            self.server.start()
        close_in_forked_children(self)
        threading.Thread(target=self.listen, name=f"{MONITOR_THREAD_PREFIX}-client", daemon=True).start()

    def send(self, message: dict) -> None:
        """Send a message to rank 0."""
        with contextlib.suppress(OSError):  # rank 0 has exited: `listen` finds out whether it was killed
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def listen(self) -> None:
        """Wait for rank 0's decision; exit if the run is aborted.

        Runs in a thread: the main thread may wait in a collective that never ends.
        """
        decision = self.receive_decision()
        if decision is not None and "rank_0_exited" in decision:
            self.rank_0_exit_reason = decision["rank_0_exited"]
            self.decision_received.set()
            return
        if decision is None:
            time.sleep(LOST_SERVER_DELAY)
            if not is_started_by_torchrun() and reports_for_rank_0():
                write_stderr(f"error: rank 0 {KILLED_MESSAGE}")
        self.failed_ranks = decision["abort"] if decision else [0]
        self.decision_received.set()
        self.exit_process()

    def receive_decision(self) -> dict | None:
        """Read rank 0's decision; None if the connection closes before it."""
        try:
            with self.connection.makefile("r") as lines:
                return json.loads(next(lines, "null"))
        except (OSError, ValueError):
            return None

    def report_failure(self, report: ExitReport, exit_status: int) -> None:
        """Abort the run and exit.

        Rank 0 chooses the message. This rank prints its own only if rank 0 has exited or does not respond.
        """
        self.exit_status = exit_status
        self.send(report._asdict())
        has_decision = self.decision_received.wait(REPLY_TIMEOUT)
        if self.rank_0_exit_reason is not None or not has_decision:
            if report.kind == "error":
                write_stderr(format_error(report, get_rank()))
            elif reports_for_rank_0():
                state = f"exited {self.rank_0_exit_reason}".rstrip() if has_decision else "does not respond"
                write_stderr(f"error: rank 0 {state}; rank {get_rank()} waited for it: {report.message}")
            self.failed_ranks = [get_rank()]
        self.exit_process()

    def exit_process(self) -> None:
        """Exit immediately, or after a short delay if other ranks have failed."""
        if get_rank() not in self.failed_ranks:
            time.sleep(EXIT_DELAY_TORCHRUN if is_started_by_torchrun() else EXIT_DELAY)
        sys.stdout.flush()
        # Not sys.exit: threads of a process group whose other ranks have exited may never end.
        exit_process(self.exit_status)

    def leave(self, reason: str = "") -> None:
        """Leave the monitor, so that this rank's exit is not a failure.

        Args:
            reason: why this rank exits early, such as "with exit status 3"; empty if its work is complete.
        """
        self.send(ExitReport("exit" if reason else "done", reason)._asdict())
        if self.server is not None:
            self.server.join(REPLY_TIMEOUT)


def reports_for_rank_0() -> bool:
    """Check whether this rank prints what happened to rank 0.

    At most one rank per node does.
    """
    return get_rank() == 1 or os.environ.get("LOCAL_RANK") == "0"


def open_listener() -> socket.socket:
    """Listen on any free port, on all addresses of this host."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def enable_keepalive(connection: socket.socket) -> None:
    """Enable TCP keepalive, by which the kernel detects a lost host.

    The connection to a host without power then closes within 90 seconds: 30 s without traffic, and 6 probes 10 s apart.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):  # macOS lacks some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def close_in_forked_children(client: RankMonitorClient) -> None:
    """Close the sockets in forked children, such as DataLoader workers.

    A copy of the socket in a child would keep the connection open after this rank is killed.
    """
    client_reference = weakref.ref(client)

    def close_sockets():
        if (parent := client_reference()) is not None:
            os.close(parent.connection.detach())
            if parent.server is not None:
                parent.server.close_connections()

    os.register_at_fork(after_in_child=close_sockets)
