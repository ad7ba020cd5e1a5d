"""Outages of object stores and network file systems, which are retried.

An outage says nothing about a sample. A sample counts as unusable only if the store answers about the object itself: it
does not exist, or its bytes are broken. Otherwise what is trained would depend on the network.
"""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

# Errors of network file systems and connections. A stale NFS handle is valid again after the next lookup.
OUTAGE_ERRNOS = {
    getattr(errno, name)
    for name in """ESTALE EIO ETIMEDOUT EHOSTUNREACH EHOSTDOWN ENETUNREACH ENETDOWN ENETRESET ECONNREFUSED ECONNRESET
    ECONNABORTED ENOTCONN ESHUTDOWN EREMOTEIO""".split()
}
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 30.0
SECONDS_BETWEEN_WARNINGS = 60.0

Result = TypeVar("Result")


class StoreUnavailableError(OSError):
    """A store or a network file system does not answer, or refuses access."""


def is_outage(error: BaseException) -> bool:
    """Return whether an error is an outage, not a property of the file."""
    return isinstance(error, StoreUnavailableError) or (isinstance(error, OSError) and error.errno in OUTAGE_ERRNOS)


def retry_during_outage(read_fn: Callable[[], Result], max_seconds: float) -> Result:
    """Return `read_fn()`; in an outage call it again, after growing pauses.

    Args:
        read_fn: must give the same result whenever it is called.
        max_seconds: after which an outage is an error; 0 for a single call.

    Raises:
        StoreUnavailableError: the outage lasts longer.
    """
    start, pause, last_warning = time.monotonic(), FIRST_PAUSE_SECONDS, -SECONDS_BETWEEN_WARNINGS
    while True:
        try:
            return read_fn()
        except OSError as error:
            if not is_outage(error):
                raise
            seconds = time.monotonic() - start
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if seconds + pause > max_seconds:
                message = f"no answer for {seconds:.0f} s (--store_retry_seconds): {reason}"
                raise StoreUnavailableError(message) from error
            if seconds - last_warning >= SECONDS_BETWEEN_WARNINGS:
                logger.warning("Outage, trying again for up to %.0f s: %s", max_seconds - seconds, reason)
                last_warning = seconds
        time.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)
