"""Run the checks of `tools/gpu_check.py` and record their outcomes.

A part is an iterator over (name, function). A function returns the values that the table shows. It raises
`SkippedCheck` if the check cannot run on this machine; any other error is a failed check.
"""

import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Checks = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


class SkippedCheck(Exception):
    """A check cannot run here; the message is the reason."""


@dataclass
class CheckResult:
    """Outcome of a check.

    Attributes:
        status: passed, failed or skipped.
        values: what was found; plain values, for JSON.
        reason: why it failed or was skipped, one line.
    """

    part: str
    name: str
    status: str
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0


def run_checks(part: str, checks: Checks) -> Iterator[CheckResult]:
    """Run the checks of a part, one after the other.

    An error in a check does not end the others. An error between checks, as in what several share, ends the part.
    """
    while True:
        start, result = time.perf_counter(), CheckResult(part, part, "passed")
        try:
            result.name, check_fn = next(checks)
            result.values = check_fn()
        except StopIteration:
            return
        except SkippedCheck as skipped:
            result.status, result.reason = "skipped", str(skipped)
        except Exception as error:
            result.status, result.reason = "failed", describe_error(error)
            if os.environ.get("INTERNVL_TRACEBACK") == "1":
                traceback.print_exc()
        result.seconds = round(time.perf_counter() - start, 3)
        yield result


def describe_error(error: Exception) -> str:
    """Describe an error in one line, with its place unless a check has raised it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines or ["no message"])[0][:400]
    if type(error) is ValueError:
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({os.path.basename(frame.filename)}:{frame.lineno})"
