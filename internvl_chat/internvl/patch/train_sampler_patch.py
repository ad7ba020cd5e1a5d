"""Upstream's sampler of samples of similar length, for code that uses it by itself.

Training here does not: `--group_by_length` is a plan (`internvl/planning/epoch_plan.py`), whose ranks
wait less for each other.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Dataset, Sampler


def split_to_even_chunks(indices: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Deal indices to chunks of equal size, each to the chunk of least total length that is not full yet.

    Where the numbers do not divide, chunk k gets every `num_chunks`-th index from the k-th on.
    """
    if len(indices) % num_chunks:
        return [list(indices[k::num_chunks]) for k in range(num_chunks)]
    size = len(indices) // num_chunks
    chunks, totals = [[] for _ in range(num_chunks)], [0.0] * num_chunks
    for index in indices:
        lightest = totals.index(min(totals))
        chunks[lightest].append(index)
        totals[lightest] += lengths[index]
        if len(chunks[lightest]) == size:
            totals[lightest] = float("inf")
    return chunks


def get_length_grouped_indices(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: torch.Generator | None = None,
    merge: bool = True,
) -> list[int]:
    """All indices, in random runs of `world_size * batch_size`, each sorted by length and dealt evenly to the ranks.

    Args:
        generator: draws the permutation; by default torch's shared one.
        merge: accepted; changes nothing.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    run = world_size * batch_size
    runs = [order[start : start + run] for start in range(0, len(order), run)]
    runs = [sorted(run, key=lambda index: lengths[index], reverse=True) for run in runs]
    return [index for run in runs for chunk in split_to_even_chunks(run, lengths, world_size) for index in chunk]


class LengthGroupedSampler(Sampler):
    """Gives the indices of `get_length_grouped_indices`.

    Args:
        lengths: length of each sample; by default counted in `dataset`, under the key `model_input_name`.
        model_input_name: by default `input_ids`.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        dataset: Dataset | None = None,
        lengths: Sequence[int] | None = None,
        model_input_name: str | None = None,
        generator: torch.Generator | None = None,
    ):
        if dataset is None and lengths is None:
            raise ValueError("LengthGroupedSampler needs a dataset or lengths.")
        if lengths is None:
            lengths = [len(dataset[index][model_input_name or "input_ids"]) for index in range(len(dataset))]
        self.batch_size, self.world_size = batch_size, world_size
        self.lengths = torch.as_tensor(lengths).tolist()
        self.generator = generator

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, self.world_size, self.generator))
