"""The micro-batches of the next step, read before the current step ends.

So the ranks know at the end of a step whether all of them can run the next one. If a store does not answer, they can
still save a checkpoint together.
"""

import logging
from collections.abc import Callable

from internvl.data.outages import is_outage
from internvl.metrics.step_timer import StepTimer
from internvl.runtime.shutdown import make_exit_report
from internvl.runtime.signals import preemption

logger = logging.getLogger(__name__)


class NextBatches:
    """Micro-batches of the next step.

    Args:
        timer: of the phases of a step.
    """

    def __init__(self, timer: StepTimer):
        self.timer = timer
        self._read_fn: Callable | None = None
        self._result = None

    def take(self, read_fn: Callable):
        """Return what was read ahead; in the first step `read_fn()`."""
        self._read_fn = read_fn
        result, self._result = self._result, None
        return self._read() if result is None else result

    def read_ahead(self) -> bool:
        """Read the micro-batches of the next step.

        Returns:
            False if a store does not answer, which is logged.
        """
        try:
            self._result = self._read()
        except OSError as error:
            if not is_outage(error):
                raise
            logger.error("The next batch cannot be read: %s", make_exit_report(error).message)
            return False
        return True

    def close(self) -> None:
        """Release the DataLoader's iterator, which ends its workers."""
        self._read_fn = self._result = None

    def _read(self):
        assert self._read_fn is not None  # `take` comes first
        self.timer.mark("data")
        with preemption.waiting_for_data():
            result = self._read_fn()
        self.timer.mark("other")
        return result
