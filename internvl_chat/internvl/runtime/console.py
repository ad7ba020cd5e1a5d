"""Console of a run. Nothing that happens to it ends the run.

Its reader may leave (`recipe | head -1`), its terminal may be closed, its disk may be full.
"""

import contextlib
import io
import os
import sys
from typing import Any


class ConsoleFile(io.FileIO):
    """File that drops what it cannot write."""

    def write(self, data, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:  # EPIPE: no reader, EIO: no terminal, ENOSPC: full disk
            return len(data)


def protect_console() -> None:
    """Make stdin, stdout and stderr usable, whatever was inherited."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened, perhaps a checkpoint, would become the console
            opened = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is `descriptor`
            os.set_inheritable(opened, True)
    sys.stdout, sys.stderr = _reopen(sys.stdout, 1), _reopen(sys.stderr, 2)


def write_console(descriptor: int, text: str) -> None:
    """Write text in one piece, so that lines of several ranks do not mix."""
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode(errors="backslashreplace"))


def _reopen(stream: Any, descriptor: int) -> io.TextIOWrapper:
    """Return a text stream on a ConsoleFile, with the settings of `stream`.

    Args:
        stream: None if Python started with a closed descriptor.
    """
    return io.TextIOWrapper(
        io.BufferedWriter(ConsoleFile(descriptor, "wb", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=stream.line_buffering if stream else True,
        write_through=stream.write_through if stream else False,  # python -u
    )
