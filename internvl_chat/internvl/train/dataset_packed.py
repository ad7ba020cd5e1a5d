"""Samples to rows: what a dataloader reads when its sampler follows a plan.

A row is samples laid end to end and still a Sample; `position_ids` that start again at 0 are the only mark of a
boundary. Here, and only here, an unusable sample is left out during training: its place stays empty and its reason
travels with the row.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch.utils.data import Dataset

from internvl.model.token_loss import REDUCTIONS, document_begins, document_bounds
from internvl.train.collator import concat_pad_data_collator
from internvl.train.constants import IGNORE_INDEX, BadSample
from internvl.train.dataset import LazySupervisedDataset
from internvl.train.splitting import Part


class PackedDataset(Dataset):
    """Rows over several data sets, whose samples are numbered on: those of the first, then those of the second, ...

    Attributes:
        parts: (sample, Part) of samples that are split, numbered on behind the whole samples.
    """

    def __init__(self, datasets: Sequence[LazySupervisedDataset]):
        self.datasets = list(datasets)
        self.ends = list(accumulate(len(dataset) for dataset in self.datasets))
        self.parts: list[tuple[int, Part]] = []

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
            except BadSample as reason:
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
            "pixel_values": dataset.no_tiles(),
            "image_flags": torch.ones(0, dtype=torch.int64),
        }


def len2weight(x: int, loss_reduction: str) -> float:
    """Weight of a label of a document of `x` labels; 0 for none."""
    if loss_reduction not in REDUCTIONS:
        raise NotImplementedError(f"loss_reduction {loss_reduction!r} is not one of {', '.join(REDUCTIONS)}.")
    return REDUCTIONS[loss_reduction](x) if x else 0.0


def packed_collate_fn(
    features: Sequence[dict],
    data_collator: Callable = concat_pad_data_collator,
    len2weight: Callable[[int], float] = lambda n: 1.0,
    max_item_length: int = 0,
    micro_num: int = 1,
    loss_reduction_all_gather: bool = False,
    pad_id: int = 0,
) -> dict:
    """Upstream's batch of rows, for code written for it; the trainer has `row_collator`.

    Args:
        features: at most `micro_num` rows; fewer are filled up with copies of the first that train nothing.
        len2weight: weight of each label of a document of so many labels.
        max_item_length: tokens to pad to; 0 for the longest row.

    Returns:
        What `data_collator` gives, `loss_weight` as a nested list, `loss_reduction_all_gather`, `statistics`
        (documents, padded tokens, tiles of flag 0), and as `attention_mask` int32 (micro_num, documents + 1): where
        documents begin.

    Raises:
        NotImplementedError: more rows than `micro_num`.
        ValueError: rows of different numbers of documents, whose bounds cannot be one tensor.
    """
    if len(features) > micro_num:
        raise NotImplementedError(f"{len(features)} rows for a micro-batch of {micro_num}")
    keys = ("input_ids", "labels", "position_ids", "pixel_values", "image_flags")
    rows = [{key: torch.as_tensor(row[key]) for key in keys} for row in features]
    rows += [rows[0] | {"labels": torch.full_like(rows[0]["labels"], IGNORE_INDEX)}] * (micro_num - len(rows))
    lengths = [len(row["input_ids"]) for row in rows]
    width, bounds, weights = max_item_length or max(lengths), [], []
    for row, length in zip(rows, lengths, strict=True):
        bounds.append(document_bounds(row["position_ids"][None]) + ([width] if length < width else []))
        document = document_begins(row["position_ids"][None])[0].cumsum(0) - 1
        counts = torch.bincount(document, (row["labels"] != IGNORE_INDEX).float())[document].tolist()
        trained = (row["labels"] != IGNORE_INDEX).tolist()
        weights.append([len2weight(int(n)) if one else 0.0 for n, one in zip(counts, trained, strict=True)])
        weights[-1] += [0.0] * (width - length)
    if len({len(row) for row in bounds}) > 1:
        raise ValueError(
            f"rows of {', '.join(str(len(row) - 1) for row in bounds)} documents do not fit into one tensor"
        )
    documents = sum(int((row["position_ids"] == 0).sum()) for row in rows[: len(features)])
    blank = sum(int((row["image_flags"] == 0).sum()) for row in rows)
    return data_collator(rows, max_item_length=width, pad_id=pad_id) | {
        "attention_mask": torch.tensor(bounds, dtype=torch.int32),
        "loss_weight": weights,
        "loss_reduction_all_gather": loss_reduction_all_gather,
        "statistics": torch.tensor([documents, len(rows) * width - sum(lengths), blank]),
    }
