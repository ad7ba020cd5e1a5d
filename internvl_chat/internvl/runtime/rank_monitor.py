"""A connection from every rank to rank 0, over which all learn at once that one of them has ended, and one says why.

Collectives alone do not tell: gloo breaks on the ranks that happen to talk to a dead one, NCCL waits until its timeout,
and no error of theirs names a rank. `train/ending.py` starts a lifeline behind `init_dist`, reports to it what ends a
rank, and says goodbye; `switchboard.py` is what listens on rank 0.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import weakref
from typing import NamedTuple

from internvl.dist_utils import rank, run_on_rank_0, world_size
from internvl.runtime.rank_monitor_server import RankMonitorServer, write_stderr

CONNECT_TIMEOUT = 60.0  # seconds for all ranks to connect
REPLY_TIMEOUT = 10.0  # seconds in which rank 0 tells what it decided, or does not answer any more
# Seconds until a rank leaves that has not failed itself. An agent (torchrun's) that sees the one that failed end first
# takes its exit status, and ends the others itself.
EXIT_DELAY = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.5
LOST_SERVER_DELAY = 0.5  # seconds until a rank tells that rank 0 is dead: a signal may be about to end them all


class ExitReport(NamedTuple):
    """Why a rank ends.

    Attributes:
        kind: `error`, its own; `cut`, a collective failed, maybe because of another rank; `exit`; `bye`, all is done.
        words: a sentence, or what completes "rank 1 left the training".
        trace: where an error of the program came from.
    """

    kind: str
    words: str = ""
    trace: str = ""


class RankMonitorClient:
    """This rank's end of the line. Making it is a collective: all ranks of a world of at least 2 must."""

    def __init__(self):
        assert world_size() > 1
        server = listening_socket() if rank() == 0 else None
        port, secret = run_on_rank_0(lambda: (server.getsockname()[1], os.urandom(16).hex()))
        self.line = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_TIMEOUT)
        self.line.settimeout(None)
        notice_a_dead_machine(self.line)
        self.over = threading.Event()  # the end of the run has been decided, or can no longer be
        self.named: list[int] = []  # the ranks that are to blame
        self.status = 1  # with which this rank ends if the run fails
        self.farewell: str | None = None  # of rank 0, which may end first
        self.send({"rank": rank(), "secret": secret})
        self.switchboard = None
        if server is not None:
            self.switchboard = RankMonitorServer(server, world_size(), secret, CONNECT_TIMEOUT)
            self.switchboard.start()
        close_in_children(self)
        threading.Thread(target=self.listen, name="lifeline", daemon=True).start()

    def send(self, message: dict) -> None:
        with contextlib.suppress(OSError):  # rank 0 has left, or died: `listen` finds out which
            self.line.sendall(json.dumps(message).encode() + b"\n")

    def listen(self) -> None:
        """Until the end: end this rank, too, when another has failed, whatever it waits for."""
        if (message := self.last_message()) is not None and "bye" in message:
            self.farewell = message["bye"]
            self.over.set()
            return
        if message is None:
            time.sleep(LOST_SERVER_DELAY)
        if message is None and "TORCHELASTIC_RUN_ID" not in os.environ and reports_for_rank_0():
            write_stderr("error: rank 0 ended without a word: killed, for instance where memory ran out, or crashed")
        self.named = message["end"] if message else [0]
        self.over.set()
        self.depart()

    def last_message(self) -> dict | None:
        """What rank 0 says last; None if it ends without a word, or within one."""
        try:
            with self.line.makefile("r") as lines:
                return json.loads(next(lines, "null"))
        except (OSError, ValueError):
            return None

    def fail(self, report: ExitReport, status: int) -> None:
        """End this rank, and the run. Rank 0 decides what is told, if any rank there still does."""
        self.status = status
        self.send(report._asdict())
        decided = self.over.wait(REPLY_TIMEOUT)
        if self.farewell is not None or not decided:
            if report.kind == "error":
                write_stderr(f"{report.trace}error on rank {rank()}: {report.words}")
            elif reports_for_rank_0():
                what = f"left the training{self.farewell}" if decided else "does not answer any more"
                write_stderr(f"error: rank 0 {what}; rank {rank()} waited for it: {report.words}")
            self.named = [rank()]
        self.depart()

    def depart(self) -> None:
        """Leave without waiting for anything: threads of a group whose ranks are gone may never end."""
        if rank() not in self.named:
            time.sleep(EXIT_DELAY)
        sys.stdout.flush()
        os._exit(self.status)

    def leave(self, words: str = "") -> None:
        """Say goodbye: from now on the end of this process means nothing to the others."""
        self.send(ExitReport("exit" if words else "bye", words)._asdict())
        if self.switchboard is not None:
            self.switchboard.join(REPLY_TIMEOUT)


def reports_for_rank_0() -> bool:
    """Whether this rank tells what becomes of rank 0: one on each machine at most."""
    return rank() == 1 or os.environ.get("LOCAL_RANK") == "0"


def listening_socket() -> socket.socket:
    """On any free port, for all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def notice_a_dead_machine(line: socket.socket) -> None:
    """Let the kernel ask for a sign of life, so that a machine without power ends the connection within 90 seconds."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def close_in_children(lifeline: RankMonitorClient) -> None:
    """Processes that read data are forked, and must not hold the line of a rank that is gone."""
    reference = weakref.ref(lifeline)

    def close():
        if (parent := reference()) is not None:
            os.close(parent.line.detach())
            if parent.switchboard is not None:
                parent.switchboard.hang_up()

    os.register_at_fork(after_in_child=close)
