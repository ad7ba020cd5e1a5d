"""Progress of slow work.

In a terminal it is a bar, elsewhere a log line every half minute.
"""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)
LOG_SECONDS = 30.0


class Progress:
    """Progress bar, or progress lines in the log.

    Args:
        total: number of items.
        description: name of the work, such as "Measuring my_data".
        unit: name of an item.
        is_shown: whether this rank shows progress.
    """

    def __init__(self, total: int, description: str, unit: str = "sample", is_shown: bool = True):
        self.total, self.description, self.unit = total, description, unit
        is_terminal = sys.stderr.isatty()
        # `delay`: work that takes less than a second shows no bar.
        self.bar = tqdm(total=total, desc=description, unit=unit, delay=1, disable=not (is_shown and is_terminal))
        self.should_log = is_shown and not is_terminal
        self.num_done = 0
        self.last_logged = time.monotonic()

    def update(self, num_items: int = 1) -> None:
        """Count items as done."""
        self.bar.update(num_items)
        self.num_done += num_items
        if self.should_log and time.monotonic() - self.last_logged >= LOG_SECONDS:
            self.last_logged = time.monotonic()
            share = self.num_done / max(1, self.total)
            logger.info(
                "%s: %d of %d %ss (%.0f%%)", self.description, self.num_done, self.total, self.unit, 100 * share
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.bar.close()
