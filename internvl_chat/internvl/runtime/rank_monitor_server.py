"""What rank 0 hears from all ranks over their lifelines, and what it makes of it: one message, and the end of all."""

import contextlib
import json
import os
import selectors
import socket
import threading
import time

# What a rank reports, that explains best why a run ends first -> seconds in which a better explanation may arrive.
# Not everything ends the run: a rank may leave while others still write, and nobody misses it.
GRACE = {"error": 2.0, "killed": 0.5, "exit": None, "cut": 2.0, "bye": None}


def write_stderr(text: str) -> None:
    """Write to stderr, in one piece, on lines of its own: the cursor may stand behind a progress bar."""
    os.write(2, f"\n{text}\n".encode(errors="replace"))


class RankMonitorServer(threading.Thread):
    """Listens on rank 0.

    Args:
        server: that all ranks connect to.
        ranks: how many there are.
        secret: that a connection must name to be one of theirs.
        patience: seconds for all to connect.

    Raises:
        OSError: not all did.
    """

    def __init__(self, server: socket.socket, ranks: int, secret: str, patience: float):
        super().__init__(name="switchboard", daemon=True)
        self.lines: dict[int, socket.socket] = {}
        self.heard: dict[int, bytes] = dict.fromkeys(range(ranks), b"")  # of a line that is not yet whole
        self.reports: dict[int, dict] = {}
        self.deadline: float | None = None
        until = time.monotonic() + patience
        with server:
            while len(self.lines) < ranks:
                server.settimeout(max(0.01, until - time.monotonic()))
                try:
                    line, _ = server.accept()
                except TimeoutError as error:
                    missing = ", ".join(str(rank) for rank in range(ranks) if rank not in self.lines)
                    raise OSError(f"ranks {missing} did not connect to rank 0 within {patience:.0f} s") from error
                if (rank := caller(line, secret)) is None:
                    line.close()
                else:
                    self.lines[rank] = line

    def run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, line in self.lines.items():
                selector.register(line, selectors.EVENT_READ, rank)
            while not self.is_decided():
                left = None if self.deadline is None else max(0, self.deadline - time.monotonic())
                for key, _ in selector.select(left):
                    if not self.hear(key.data):
                        selector.unregister(self.lines[key.data])
        if self.deadline is None:
            self.tell_all({"bye": self.reports[0]["words"]})
        else:
            ranks, words = self.verdict()
            if words:
                write_stderr(words)
            self.tell_all({"end": ranks})

    def is_decided(self) -> bool:
        """Whether the run is over, or rank 0 leaves it."""
        if self.deadline is None:
            return 0 in self.reports
        return len(self.reports) == len(self.lines) or time.monotonic() >= self.deadline

    def hear(self, rank: int) -> bool:
        """Take in what a rank sends; False at the end of its line."""
        try:
            received = self.lines[rank].recv(1 << 16)
        except OSError:  # reset
            received = b""
        *whole, self.heard[rank] = (self.heard[rank] + received).split(b"\n")
        for report in map(json.loads, whole):
            self.note(rank, report)
        if not received and rank not in self.reports:
            self.note(rank, {"kind": "killed", "words": "", "trace": ""})
        return bool(received)

    def note(self, rank: int, report: dict) -> None:
        self.reports.setdefault(rank, report)
        if (grace := GRACE[report["kind"]]) is not None:
            self.deadline = min(self.deadline or float("inf"), time.monotonic() + grace)

    def verdict(self) -> tuple[list[int], str]:
        """The ranks that end the run, and the message; none if whoever started the ranks tells it."""
        kind = min((report["kind"] for report in self.reports.values()), key=list(GRACE).index)
        ranks = sorted(rank for rank, report in self.reports.items() if report["kind"] == kind)
        # A rank whose wait times out breaks those of the ranks that wait with it: its own words say more.
        ranks.sort(key=lambda rank: kind == "cut" and "timed out" not in self.reports[rank]["words"].lower())
        report, silent = self.reports[ranks[0]], sorted(self.lines.keys() - self.reports.keys())
        if kind == "error":
            everywhere = all(self.reports.get(rank, {}).get("words") == report["words"] for rank in self.lines)
            where = "" if everywhere else f" on rank {ranks[0]}"
            return ranks, f"{report['trace']}error{where}: {report['words']}"
        if kind == "killed":
            told = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun knows the signal
            words = "ended without a word: killed, for instance where memory ran out, or crashed"
            return ranks, "" if told else f"error: {named(ranks)} {words}"
        if kind == "exit":
            return ranks, f"error: {named(ranks)} left the training{report['words']} while others were in it"
        done = sorted(rank for rank, report in self.reports.items() if report["kind"] == "bye")
        if silent or done:
            what = "did not take part in" if silent else "left the training, and took no part in"
            waited = f"what rank {ranks[0]} waited for: {report['words']}"
            return silent or done, f"error: {named(silent or done)} {what} {waited}"
        return ranks, f"{report['trace']}error on rank {ranks[0]}: {report['words']}"

    def tell_all(self, message: dict) -> None:
        for rank in sorted(self.lines, reverse=True):  # rank 0, which may end at once when it hears it, last
            with contextlib.suppress(OSError):  # it is gone
                self.lines[rank].sendall(json.dumps(message).encode() + b"\n")

    def hang_up(self) -> None:
        """In a forked child: there the lines are of no use, and open ends of them."""
        for line in self.lines.values():
            os.close(line.detach())


def named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def caller(line: socket.socket, secret: str) -> int | None:
    """The rank that is at the other end; None if it is a stranger."""
    line.settimeout(10)
    try:
        greeting = b""
        while not greeting.endswith(b"\n") and len(greeting) < 200:
            if not (received := line.recv(1)):
                return None
            greeting += received
        said = json.loads(greeting)
    except (OSError, ValueError):
        return None
    line.settimeout(30)
    return said["rank"] if isinstance(said, dict) and said.get("secret") == secret else None
