"""Inspect the samples of a run: suspicious texts, and damage that only decoding finds.

Lengths are measured from texts and headers. Here samples are loaded as in training, by the same datasets and workers.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset

from internvl.constants import UnusableSample
from internvl.data.record_warnings import find_warnings
from internvl.data.schema import get_media
from internvl.planning.packed_dataset import PackedDataset
from internvl.progress import Progress


class Inspection(NamedTuple):
    """Findings of `inspect_samples`.

    Attributes:
        unusable: sample id -> reason, for samples that cannot be decoded.
        warnings: what is suspicious, see `find_warnings` -> ids of the samples that have it.
    """

    unusable: dict[int, str]
    warnings: dict[str, list[int]]


def inspect_samples(rows: PackedDataset, samples: Sequence[int], num_epochs: int, num_workers: int) -> Inspection:
    """Inspect samples with the workers of a DataLoader.

    Args:
        samples: ids of samples that are usable as far as measured; no pieces.
        num_epochs: load the frames that these epochs read; 0 decodes nothing.
    """
    inspection = Inspection({}, defaultdict(list))
    loader = DataLoader(
        _InspectedSamples(rows, num_epochs), sampler=samples, batch_size=16, collate_fn=list, num_workers=num_workers
    )
    with Progress(len(samples), "Decoding samples" if num_epochs else "Reading records") as progress:
        for sample, reason, warnings in (result for results in loader for result in results):
            if reason:
                inspection.unusable[sample] = reason
            for warning in warnings:
                inspection.warnings[warning].append(sample)
            progress.update()
    return inspection


class _InspectedSamples(Dataset):
    """(sample, reason why it cannot be decoded or "", warnings), for a DataLoader."""

    def __init__(self, rows: PackedDataset, num_epochs: int):
        self.rows, self.num_epochs = rows, num_epochs

    def __getitem__(self, sample: int) -> tuple[int, str, list[str]]:
        dataset, index = self.rows.locate(sample)
        try:
            record = dataset.read_record(index)
        except UnusableSample as error:  # it has changed since it was measured
            return sample, str(error), []
        # Which frames of a video are read changes with the epoch; images are the same in each.
        num_epochs = self.num_epochs if get_media(record)[0] == "video" else min(1, self.num_epochs)
        skipped = (self.rows[epoch, sample]["bad_samples"] for epoch in range(num_epochs))
        warnings = find_warnings(dataset.list_conversations(record), record, dataset.known_keys)
        sentences = next(filter(None, skipped), [""])
        return sample, sentences[0].removeprefix(f"{dataset.describe(index)}: "), warnings
