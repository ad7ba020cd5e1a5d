"""Report skipped samples; fail if there are too many."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from internvl.arguments.data import DataTrainingArguments
from internvl.data.supervised_dataset import LazySupervisedDataset

logger = logging.getLogger(__name__)
NUM_LISTED = 20
SKIPPED_SAMPLES_FILE = "skipped_samples.jsonl"  # in the output folder of a run


class SkippedSample(NamedTuple):
    """An unusable sample: its dataset, file, line, and the reason."""

    dataset: str
    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.dataset} line {self.line} ({self.file}): {self.reason}"


def describe_skipped(dataset: LazySupervisedDataset, index: int, reason: str) -> SkippedSample:
    """Describe a skipped sample by its file and line."""
    return SkippedSample(dataset.ds_name, dataset.annotations.path, dataset.line_number(index), reason)


def count_max_skipped_samples(data_args: DataTrainingArguments, num_samples: int) -> int:
    """Convert `--max_bad_samples`, a count or a share below 1, to a count."""
    limit = data_args.max_bad_samples
    return int(limit * num_samples) if limit < 1 else int(limit)


def report_skipped_samples(
    skipped: list[SkippedSample], lengths: np.ndarray, data_args: DataTrainingArguments, name: str = "samples"
) -> None:
    """Log the first skipped samples; reject too many.

    Args:
        lengths: (N,) of SAMPLE_LENGTHS, of all samples; zeros for skipped ones.
        name: of the samples, in the message.

    Raises:
        ValueError: more than --max_bad_samples are skipped, or all; the message lists them.
    """
    for sample in skipped[:NUM_LISTED]:
        logger.warning("Skipped sample: %s", sample)
    max_skipped = count_max_skipped_samples(data_args, len(lengths))
    if len(skipped) > max_skipped or not lengths["tokens"].any():
        raise make_too_many_skipped_error(list(map(str, skipped)), max_skipped, name)


class SkippedSampleReport:
    """Skipped samples of a run, each with its file, line and reason.

    Args:
        skipped: the samples that were skipped before training.
        max_skipped: `--max_bad_samples` as a count.
    """

    def __init__(self, skipped: Iterable[str], max_skipped: int):
        self.skipped = list(skipped)
        self.max_skipped = max_skipped
        self.file: Path | None = None

    def open_file(self, file: Path, is_resumed: bool) -> None:
        """Write the samples to a file, to which `add` appends.

        Args:
            is_resumed: keep the lines that the file has.
        """
        self.file = file
        if not is_resumed:
            file.unlink(missing_ok=True)
        self._append(self.skipped)

    def _append(self, sentences: list[str]) -> None:
        if self.file and sentences:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps({"sample": sentence}) + "\n" for sentence in sentences)

    def add(self, samples: Iterable[str]) -> None:
        """Add samples and log those that are new.

        Raises:
            ValueError: more than `max_skipped` samples are unusable.
        """
        known = set(self.skipped)
        new = [sentence for sentence in dict.fromkeys(samples) if sentence not in known]
        self.skipped += new
        self._append(new)
        for sentence in new:
            logger.warning("Skipped sample: %s", sentence)
        if new and len(self.skipped) > self.max_skipped:
            raise make_too_many_skipped_error(self.skipped, self.max_skipped)


def make_too_many_skipped_error(skipped: list[str], max_skipped: int, name: str = "samples") -> ValueError:
    """Create the error that lists the unusable samples of a run."""
    listed = "\n".join(f"  {sentence}" for sentence in skipped[:NUM_LISTED])
    more = f"\n  ... and {len(skipped) - NUM_LISTED} more" if len(skipped) > NUM_LISTED else ""
    return ValueError(
        f"{len(skipped)} {name} are unusable, --max_bad_samples allows {max_skipped}; fix or remove them:\n"
        f"{listed}{more}"
    )
