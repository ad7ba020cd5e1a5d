"""Contenders that take turns, and intervals of what they measure.

Each contender is a process of its own. In a turn, all of them do the same work, one after the other; the next turn runs
in the opposite order. Other programs on the machine slow down all contenders alike, so contenders are compared turn by
turn.

    python -m internvl.tools.benchmark.turns MODULE:FUNCTION    # started by `ContenderProcess`
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from math import comb
from typing import Any, NamedTuple

CONFIDENCE = 0.95
MIN_TURNS = 6  # fewer values have no interval of the median at 95 %


class MedianInterval(NamedTuple):
    """A median with its 95 % interval; the range of all values if they are fewer than six."""

    median: float
    low: float
    high: float


def compute_median_interval(values: Sequence[float]) -> MedianInterval:
    """Compute the median and its interval by order statistics.

    The true median lies below the k-th smallest of n values if fewer than k of them lie below it, which has the
    probability P(X < k) of a binomial X ~ B(n, 1/2). The largest k is taken with 2 P(X < k) <= 5 %. No distribution is
    assumed. Source: Conover, Practical nonparametric statistics, the quantile test.
    """
    ordered, num_values = sorted(values), len(values)
    rank, miss_ways = 0, 2  # ways to miss the median if the interval is ordered[rank] to ordered[-1 - rank]
    while miss_ways + 2 * comb(num_values, rank + 1) <= (1 - CONFIDENCE) * 2**num_values:
        rank += 1
        miss_ways += 2 * comb(num_values, rank)
    median = (ordered[(num_values - 1) // 2] + ordered[num_values // 2]) / 2
    return MedianInterval(median, ordered[rank], ordered[-1 - rank])


def compare_turns(values: Sequence[float], reference_values: Sequence[float]) -> MedianInterval:
    """Compute the median ratio values / reference_values of the same turns."""
    return compute_median_interval([a / b for a, b in zip(values, reference_values, strict=True)])


def format_interval(interval: MedianInterval, form: str = ".2f", unit: str = "") -> str:
    """Format an interval as "median [low, high]"."""
    median, low, high = (f"{value:{form}}" for value in interval)
    return f"{median}{unit} [{low}, {high}]"


class Measurement(NamedTuple):
    """What a contender reported.

    Attributes:
        facts: before its first turn. A contender with the fact `error` takes no turn.
        turns: a result per turn.
    """

    facts: dict
    turns: list[dict]

    def list_values(self, name: str) -> list[float]:
        """List a number of all turns."""
        return [turn[name] for turn in self.turns]


class ContenderProcess:
    """A contender in its own process, as a context manager.

    Args:
        start_fn: "MODULE:FUNCTION". The function takes the task as keyword arguments and returns the facts and a
            function that runs a turn; both results are JSON objects.
        folder: working folder, the first that packages are imported from.
    """

    def __init__(self, start_fn: str, folder: str | None = None):
        command = [sys.executable, "-W", "ignore", "-m", "internvl.tools.benchmark.turns", start_fn]
        pipe = subprocess.PIPE
        self.process: Any = subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> "ContenderProcess":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, arguments: dict) -> dict:
        """Send the task, or the arguments of a turn, and return the result.

        Raises:
            ValueError: the process has ended.
        """
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(arguments) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"a contender failed with exit status {self.process.wait()}, see above: {arguments}")
        return json.loads(line)


def measure_in_turns(
    start_fn: str,
    tasks: dict[str, dict],
    turns: list[dict],
    together: bool = True,
    folders: dict[str, str | None] | None = None,
) -> dict[str, Measurement]:
    """Measure contenders in turns.

    Args:
        start_fn: of `ContenderProcess`.
        tasks: contender -> task.
        turns: keyword arguments of each turn.
        together: keep all contenders alive and alternate between them. Otherwise one takes all turns before the next
            starts, for devices that hold only one of them.
        folders: contender -> `folder` of its process.
    """
    measurements = {}
    for names in [list(tasks)] if together else [[name] for name in tasks]:
        with ExitStack() as stack:
            # All load their libraries at the same time. After that only one is at work.
            processes = {
                name: stack.enter_context(ContenderProcess(start_fn, (folders or {}).get(name))) for name in names
            }
            for name in names:
                print(f"starting: {name}", file=sys.stderr, flush=True)
                measurements[name] = Measurement(processes[name].ask(tasks[name]), [])
            running = [name for name in names if "error" not in measurements[name].facts]
            for number, turn in enumerate(turns):
                print(f"turn {number + 1} of {len(turns)}", file=sys.stderr, flush=True)
                for name in running if number % 2 == 0 else reversed(running):
                    measurements[name].turns.append(processes[name].ask(turn))
    return measurements


def serve_turns(start_fn: str) -> None:
    """Start a contender from the first line of standard input, then run a turn for each line."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    module, function = start_fn.split(":")
    start = getattr(import_module(module), function)
    facts, run_turn = start(**json.loads(sys.stdin.readline()))
    print(json.dumps(facts), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(run_turn(**json.loads(line))), file=channel, flush=True)


if __name__ == "__main__":
    serve_turns(sys.argv[1])
