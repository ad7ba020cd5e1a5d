"""Samples to rows: what a dataloader reads when its sampler follows a plan.

A row is samples laid end to end and still a Sample; `position_ids` that start again at 0 are the only mark of a
boundary. Here, and only here, an unusable sample is left out during training: its place stays empty and its reason
travels with the row.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch.utils.data import Dataset

from internvl.constants import IGNORE_INDEX, UnusableSample
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.oversized_samples import SamplePiece


class PackedDataset(Dataset):
    """Rows over several data sets, whose samples are numbered on: those of the first, then those of the second, ...

    Attributes:
        parts: (sample, Part) of samples that are split, numbered on behind the whole samples.
    """

    def __init__(self, datasets: Sequence[LazySupervisedDataset]):
        self.datasets = list(datasets)
        self.ends = list(accumulate(len(dataset) for dataset in self.datasets))
        self.parts: list[tuple[int, SamplePiece]] = []

    def __len__(self) -> int:
        """Number of samples and parts."""
        return self.ends[-1] + len(self.parts)

    def origin(self) -> np.ndarray:
        """(len,) the sample that each sample or part is of."""
        return np.append(np.arange(self.ends[-1]), np.array([sample for sample, _ in self.parts], np.int64))

    def locate(self, sample: int) -> tuple[LazySupervisedDataset, int]:
        """The data set of a sample, or of a part's, and its index there."""
        assert 0 <= sample < len(self), f"sample {sample} of {len(self)}"
        if sample >= self.ends[-1]:
            sample, _ = self.parts[sample - self.ends[-1]]
        position = bisect_right(self.ends, sample)
        dataset = self.datasets[position]
        return dataset, sample - self.ends[position] + len(dataset)

    def __getitem__(self, key: tuple[int, ...]) -> dict:
        """The row of samples `key[1:]` as epoch `key[0]` sees them; -1 is an empty slot.

        Returns:
            A Sample; `documents`, the number of tokens of each conversation in it; and `bad_samples`, a sentence on
            each sample that had to be left out. Nothing left: `empty_row`.
        """
        epoch, *ids = key
        samples, bad_samples = [], []
        for number in (number for number in ids if number >= 0):
            dataset, index = self.locate(number)
            try:
                sample = dataset.get(index, epoch)
                samples.append(sample if number < self.ends[-1] else self.parts[number - self.ends[-1]][1].of(sample))
            except UnusableSample as reason:
                bad_samples.append(f"{dataset.describe(index)}: {reason}")
        row = (
            {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
            if samples
            else self.empty_row()
        )
        documents = [len(sample[key]) for sample in samples for key in sample if key.endswith("input_ids")]
        return {**row, "documents": documents, "bad_samples": bad_samples}

    def empty_row(self) -> dict[str, torch.Tensor]:
        """A row that trains nothing and yet runs through the whole model, so that ranks stay in step."""
        dataset = self.datasets[0]
        return {
            "input_ids": torch.full((2,), dataset.tokenizer.pad_token_id),
            "labels": torch.full((2,), IGNORE_INDEX),
            "position_ids": torch.arange(2),
            "pixel_values": dataset.empty_tiles(),
            "image_flags": torch.ones(0, dtype=torch.int64),
        }
