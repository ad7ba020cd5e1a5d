"""Report skipped samples; fail if there are too many."""

import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)
NUM_LISTED = 20


class SkippedSampleReport:
    """Skipped samples of a run, each with its file, line and reason.

    Args:
        skipped: the samples that were skipped before training.
        max_skipped: `--max_bad_samples` as a count.
    """

    def __init__(self, skipped: Iterable[str], max_skipped: int):
        self.skipped = list(skipped)
        self.max_skipped = max_skipped

    def add(self, samples: Iterable[str]) -> None:
        """Add samples and log those that are new.

        Raises:
            ValueError: more than `max_skipped` samples are unusable.
        """
        known = set(self.skipped)
        new = [sentence for sentence in dict.fromkeys(samples) if sentence not in known]
        self.skipped += new
        for sentence in new:
            logger.warning("Skipped sample: %s", sentence)
        if new and len(self.skipped) > self.max_skipped:
            raise make_too_many_skipped_error(self.skipped, self.max_skipped)


def make_too_many_skipped_error(skipped: list[str], max_skipped: int) -> ValueError:
    """Create the error that lists the unusable samples of a run."""
    listed = "\n".join(f"  {sentence}" for sentence in skipped[:NUM_LISTED])
    more = f"\n  ... and {len(skipped) - NUM_LISTED} more" if len(skipped) > NUM_LISTED else ""
    return ValueError(
        f"{len(skipped)} samples are unusable, --max_bad_samples allows {max_skipped}; fix or remove them:\n"
        f"{listed}{more}"
    )
