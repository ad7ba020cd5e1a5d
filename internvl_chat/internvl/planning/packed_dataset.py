"""Packed sequences: the dataset of a DataLoader that follows an epoch plan.

A row is one or more samples, concatenated, with the keys of a sample. `position_ids` restart at 0 for each of them,
which is the only mark of a boundary. Unusable samples that are found during training are skipped only here: the row is
shorter then, and carries the reason in `bad_samples`.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch.utils.data import Dataset

from internvl.constants import IGNORE_INDEX, UnusableSample, get_pad_id
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.oversized_samples import SamplePiece


class PackedDataset(Dataset):
    """Rows of samples of several datasets.

    Sample ids count the samples of the first dataset, then those of the second, ..., then the pieces of split samples.

    Args:
        lengths: (N,) of SAMPLE_LENGTHS, as measured. A sample of another length is unusable, because an image or video
            has been changed since. None: lengths are not compared.

    Attributes:
        ends: for each dataset, its last sample id plus one.
        pieces: (sample id, piece) of oversized samples that are split.
    """

    def __init__(self, datasets: Sequence[LazySupervisedDataset], lengths: np.ndarray | None = None):
        self.datasets, self.lengths = list(datasets), lengths
        self.ends = list(accumulate(len(dataset) for dataset in self.datasets))
        self.pieces: list[tuple[int, SamplePiece]] = []

    @property
    def num_unsplit(self) -> int:
        """Number of samples without the pieces; the id of the first piece."""
        return self.ends[-1]

    def __len__(self) -> int:
        """Return the number of samples and pieces."""
        return self.num_unsplit + len(self.pieces)

    def get_source_samples(self) -> np.ndarray:
        """Return the original sample of each sample or piece: (len,) ids."""
        return np.append(np.arange(self.num_unsplit), np.array([sample for sample, _ in self.pieces], np.int64))

    def get_source_sample(self, sample: int) -> int:
        """Return the original sample of a sample or piece."""
        return sample if sample < self.num_unsplit else self.pieces[sample - self.num_unsplit][0]

    def locate(self, sample: int) -> tuple[LazySupervisedDataset, int]:
        """Find the dataset of a sample or piece, and its index there."""
        assert 0 <= sample < len(self), f"sample {sample} of {len(self)}"
        sample = self.get_source_sample(sample)
        position = bisect_right(self.ends, sample)
        dataset = self.datasets[position]
        return dataset, sample - self.ends[position] + len(dataset)

    def __getitem__(self, key: tuple[int, ...]) -> dict:
        """Load the row of the samples `key[1:]` in epoch `key[0]`.

        Args:
            key: (epoch, *sample ids); -1 is an empty slot.

        Returns:
            The tensors of a sample; `documents`, the number of tokens of each conversation; and `bad_samples`, location
            and reason of each skipped sample. If no sample is left, the tensors are those of `make_empty_row`.
        """
        epoch, *sample_ids = key
        samples, skipped = [], []
        for sample_id in sample_ids:
            if sample_id < 0:
                continue
            dataset, index = self.locate(sample_id)
            try:
                sample = dataset.get(index, epoch)
                self._require_measured_length(sample_id, sample)
            except UnusableSample as error:
                skipped.append(f"{dataset.describe(index)}: {error}")
                continue
            if sample_id >= self.num_unsplit:
                sample = self.pieces[sample_id - self.num_unsplit][1].extract_from(sample)
            samples.append(sample)
        if samples:
            row = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
        else:
            row = self.make_empty_row()
        # A preference pair has two conversations: chosen_input_ids and rejected_input_ids.
        documents = [len(sample[name]) for sample in samples for name in sample if name.endswith("input_ids")]
        return {**row, "documents": documents, "bad_samples": skipped}

    def _require_measured_length(self, sample_id: int, sample: dict[str, torch.Tensor]) -> None:
        """Raise UnusableSample if a loaded sample is longer or shorter than planned."""
        if self.lengths is None:
            return
        expected = self.lengths[self.get_source_sample(sample_id)]
        # A preference pair has two conversations.
        num_tokens = sum(len(sample[name]) for name in sample if name.endswith("input_ids"))
        num_tiles = len(sample["pixel_values"])
        if (num_tokens, num_tiles) != (expected["tokens"], expected["tiles"]):
            dataset, index = self.locate(sample_id)
            raise UnusableSample(
                f"it has {num_tokens} tokens and {num_tiles} tiles, measured were {expected['tokens']} and "
                f"{expected['tiles']}: {', '.join(dataset.list_media_paths(index))} changed during the run"
            )

    def make_empty_row(self) -> dict[str, torch.Tensor]:
        """Make a row without loss tokens.

        A rank without samples runs it through the model, because every rank must take part in every step.
        """
        dataset = self.datasets[0]
        return {
            "input_ids": torch.full((2,), get_pad_id(dataset.tokenizer)),
            "labels": torch.full((2,), IGNORE_INDEX),
            "position_ids": torch.arange(2),
            "pixel_values": dataset.make_empty_tiles(),
            "image_flags": torch.ones(0, dtype=torch.int64),
        }
