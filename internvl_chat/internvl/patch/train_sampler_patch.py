"""Upstream's sampler that groups samples of similar length.

For code written for upstream. Training does not use it: `--group_by_length` is an epoch plan here
(`internvl/planning/epoch_plan.py`), with less load imbalance between ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from internvl.patch.replaced_functions import replace_train_sampler  # noqa: F401


def split_to_even_chunks(indices: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Split indices into chunks of equal size and similar total length.

    Each index goes to the shortest chunk that is not full yet. If the number of indices is not divisible by
    `num_chunks`, chunk k gets every `num_chunks`-th index, starting with the k-th.
    """
    if len(indices) % num_chunks:
        return [list(indices[k::num_chunks]) for k in range(num_chunks)]
    chunk_size = len(indices) // num_chunks
    chunks, total_lengths = [[] for _ in range(num_chunks)], [0.0] * num_chunks
    for index in indices:
        shortest = total_lengths.index(min(total_lengths))
        chunks[shortest].append(index)
        total_lengths[shortest] += lengths[index]
        if len(chunks[shortest]) == chunk_size:
            total_lengths[shortest] = float("inf")  # full: never the shortest again
    return chunks


def get_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    merge: bool = True,
) -> list[int]:
    """Order all indices at random, in groups of similar length.

    Each group of `world_size * batch_size` random indices is sorted by length, longest first, and split evenly between
    the ranks.

    Args:
        generator: draws the permutation; by default torch's global one.
        merge: ignored.
    """
    permutation = torch.randperm(len(lengths), generator=generator).tolist()
    group_size = world_size * batch_size
    groups = [permutation[start : start + group_size] for start in range(0, len(permutation), group_size)]
    groups = [sorted(group, key=lambda index: lengths[index], reverse=True) for group in groups]
    return [index for group in groups for chunk in split_to_even_chunks(group, lengths, world_size) for index in chunk]


class LengthGroupedSampler(Sampler):
    """Sampler over `get_length_grouped_indices`.

    Args:
        lengths: length of each sample; by default that of `dataset[index][model_input_name]`.
        model_input_name: by default `input_ids`.

    Raises:
        ValueError: neither `dataset` nor `lengths` is given.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        dataset: Any = None,
        lengths: Sequence[int] | None = None,
        model_input_name: str | None = None,
        generator: torch.Generator | None = None,
    ):
        if dataset is None and lengths is None:
            raise ValueError("LengthGroupedSampler requires a dataset or lengths.")
        if lengths is None:
            lengths = [len(dataset[index][model_input_name or "input_ids"]) for index in range(len(dataset))]
        self.batch_size, self.world_size = batch_size, world_size
        self.lengths = torch.as_tensor(lengths).tolist()
        self.generator = generator

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, self.world_size, self.generator))
