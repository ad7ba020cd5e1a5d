"""Datasets and their measurements, as one sequence of samples.

Training data and evaluation sets are opened and measured here. A record may be held out of the training data for
evaluation, which the hash of its content decides: the decision stays the same when data is added, when ranks, epochs or
`repeat_time` change, and for every copy of the record.
"""

import logging
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from internvl.data.skipped_samples import SkippedSample, describe_skipped
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.packed_dataset import PackedDataset
from internvl.planning.sample_lengths import MeasuredDataset, RankGroup, measure_dataset

logger = logging.getLogger(__name__)


class MeasuredPart(NamedTuple):
    """A dataset and its measurements."""

    dataset: LazySupervisedDataset
    measurements: MeasuredDataset

    def select(self, indices: np.ndarray) -> "MeasuredPart":
        """Select some of the samples."""
        return MeasuredPart(self.dataset.select(indices), self.measurements.select(indices))

    def select_records(self) -> "MeasuredPart":
        """Select the first sample of each record, without random choices: for evaluation."""
        _, first_samples = np.unique(self.dataset.record_indices, return_index=True)
        part = self.select(first_samples)
        return part._replace(dataset=part.dataset.without_randomness())


class MeasuredData(NamedTuple):
    """The samples of several datasets and their measurements.

    Arrays are over all samples, in the order of `dataset`.

    Attributes:
        lengths: (N,) of SAMPLE_LENGTHS; zeros where a sample is skipped.
        digests: (N,) int32, a checksum of each sample's record.
        lost_loss_tokens: (N,) int32, see `MeasuredDataset`.
        content_hashes: (N,) int64, see `hash_record`.
    """

    dataset: PackedDataset
    lengths: np.ndarray
    digests: np.ndarray
    lost_loss_tokens: np.ndarray
    content_hashes: np.ndarray
    skipped_samples: list[SkippedSample]


def measure_datasets(
    datasets: Iterable[LazySupervisedDataset], num_processes: int, rank_group: RankGroup
) -> list[MeasuredPart]:
    """Measure datasets; rank 0 shows the progress.

    Args:
        num_processes: see `measure_dataset`.
    """
    options = {"show_progress": rank_group.rank == 0, "rank_group": rank_group}
    return [MeasuredPart(dataset, measure_dataset(dataset, num_processes, **options)) for dataset in datasets]


def join_parts(parts: list[MeasuredPart]) -> MeasuredData:
    """Concatenate the samples of datasets."""
    names = "lengths", "digests", "lost_loss_tokens", "content_hashes"
    arrays = {name: np.concatenate([getattr(part.measurements, name) for part in parts]) for name in names}
    return MeasuredData(
        dataset=PackedDataset([part.dataset for part in parts], arrays["lengths"]),
        skipped_samples=[
            describe_skipped(part.dataset, index, reason)
            for part in parts
            for index, reason in part.measurements.unusable
        ],
        **arrays,
    )


# -- held-out records --------------------------------------------------------------------------------------------------


def find_held_out(content_hashes: np.ndarray, share: float) -> np.ndarray:
    """Choose the records whose hash, as a fraction of its range, is below a share.

    Args:
        content_hashes: (N,) int64.

    Returns:
        (N,) bool.
    """
    return content_hashes.view(np.uint64) < np.uint64(int(share * 2**64))


def hold_out(parts: list[MeasuredPart], share: float) -> tuple[list[MeasuredPart], list[MeasuredPart]]:
    """Split datasets into training and held-out samples.

    Args:
        share: `--eval_share`, in (0, 1).

    Returns:
        The training samples, and the held-out records, each once. Datasets without any are left out.

    Raises:
        ValueError: one of both is empty.
    """
    training, held_out = [], []
    for part in parts:
        is_held_out = find_held_out(part.measurements.content_hashes, share)
        num_held_out, num_samples = np.count_nonzero(is_held_out), len(is_held_out)
        if num_held_out in (0, num_samples):
            logger.warning(
                "Held-out records: %s of the %d samples of dataset %s (--eval_share %g)",
                *("all" if num_held_out else "none", num_samples, part.dataset.ds_name, share),
            )
        if num_held_out < num_samples:
            training.append(part.select(np.flatnonzero(~is_held_out)))
        if num_held_out:
            held_out.append(part.select(np.flatnonzero(is_held_out)).select_records())
    if not training or not held_out:
        num_samples = sum(len(part.dataset) for part in parts)
        side, advice = ("all", "lower") if held_out else ("none", "raise")
        raise ValueError(
            f"--eval_share {share:g} holds out {side} of the {num_samples:,} training samples: {advice} it, or name "
            "evaluation sets by --eval_meta_path."
        )
    return training, held_out
