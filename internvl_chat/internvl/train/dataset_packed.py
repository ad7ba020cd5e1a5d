"""Samples to rows: what a dataloader reads when its sampler follows a plan.

A row is samples laid end to end and still a Sample; `position_ids` that start again at 0 are the only mark of a
boundary. Here, and only here, an unusable sample is left out during training: its place stays empty and its reason
travels with the row.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.utils.data import Dataset

from internvl.train.constants import IGNORE_INDEX, BadSample
from internvl.train.dataset import LazySupervisedDataset


class PackedDataset(Dataset):
    """Rows over several data sets, whose samples are numbered on: those of the first, then those of the second, ..."""

    def __init__(self, datasets: Sequence[LazySupervisedDataset]):
        self.datasets = list(datasets)
        self.ends = list(accumulate(len(dataset) for dataset in self.datasets))

    def __len__(self) -> int:
        """Number of samples."""
        return self.ends[-1]

    def locate(self, sample: int) -> tuple[LazySupervisedDataset, int]:
        """The data set of a sample and its index there."""
        assert 0 <= sample < len(self), f"sample {sample} of {len(self)}"
        position = bisect_right(self.ends, sample)
        dataset = self.datasets[position]
        return dataset, sample - self.ends[position] + len(dataset)

    def __getitem__(self, key: tuple[int, ...]) -> dict:
        """The row of samples `key[1:]` as epoch `key[0]` sees them; -1 is an empty slot.

        Returns:
            A Sample, and `bad_samples`: a sentence on each sample that had to be left out. Nothing left: `empty_row`.
        """
        epoch, *ids = key
        samples, bad_samples = [], []
        for dataset, index in (self.locate(sample) for sample in ids if sample >= 0):
            try:
                samples.append(dataset.get(index, epoch))
            except BadSample as reason:
                bad_samples.append(f"{dataset.describe(index)}: {reason}")
        row = (
            {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
            if samples
            else self.empty_row()
        )
        return {**row, "bad_samples": bad_samples}

    def empty_row(self) -> dict[str, torch.Tensor]:
        """A row that trains nothing and yet runs through the whole model, so that ranks stay in step."""
        dataset = self.datasets[0]
        return {
            "input_ids": torch.full((2,), dataset.tokenizer.pad_token_id),
            "labels": torch.full((2,), IGNORE_INDEX),
            "position_ids": torch.arange(2),
            "pixel_values": dataset.no_tiles(),
            "image_flags": torch.ones(0, dtype=torch.int64),
        }
