"""Measure every sample before training: tokens, trained tokens, tiles, and which samples cannot be used.

Stands between `dataset.py` and `plan.py`. Works from text and image headers only, over all processes of all ranks,
once: the result is kept on disk under a fingerprint of everything that decides it, and so is the part of it that is
there when a run is interrupted.
"""

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from internvl.constants import UnusableSample
from internvl.data.file_io import file_stamp, get_cache_dir, is_remote, write_atomically
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.epoch_plan import SampleLengths

VERSION = 3  # of the files; to be raised whenever samples of the same data change
CHUNK = 256  # samples that a process measures at a time
ROUND = 16384  # samples of a rank after which what is measured is written down
WORTH_A_PROCESS = 4000  # samples for which it pays to start one, which takes seconds
UNKNOWN = -1  # tokens of a sample that is yet to be measured
# Fields of DataTrainingArguments that decide lengths.
FIELDS = (
    "conv_style",
    "force_image_size",
    "dynamic_image_size",
    "use_thumbnail",
    "min_dynamic_patch",
    "min_num_frame",
    "max_num_frame",
)


class RankGroup(NamedTuple):
    """The processes that measure together; `gathered(value)` is the list of all ranks' values, on every rank."""

    rank: int = 0
    world_size: int = 1
    gathered: Callable[[Any], list] = lambda value: [value]


SINGLE_RANK = RankGroup()


class MeasuredDataset(NamedTuple):
    """What is known of the samples of a data set.

    Attributes:
        digests: (N,) int32, a checksum of each record.
        bad: (index, reason) of each sample that cannot be used; its lengths are 0.
    """

    lengths: SampleLengths
    digests: np.ndarray
    bad: list[tuple[int, str]]


def measure_dataset(
    dataset: LazySupervisedDataset,
    processes: int = 0,
    cache_dir: str | None = None,
    progress: bool = True,
    ranks: RankGroup = SINGLE_RANK,
) -> MeasuredDataset:
    """Lengths of all samples, as `dataset.get` produces them in any epoch.

    What is kept on disk is trusted except for unusable samples, whose files may have been mended, and for those whose
    pictures have another size or time than then: these are measured again.

    Args:
        processes: to use at most on this rank; below 2 this process measures.
        cache_dir: folder for results; by default $INTERNVL_CACHE, else ~/.cache/internvl_chat. Of rank 0 alone.
        progress: show a bar.

    Raises:
        ValueError: the folder cannot be written.
    """
    stem = Path(cache_dir or get_cache_dir()) / f"lengths-{lengths_cache_key(dataset)}"
    # Repeats of a record are as long as its first appearance: only that is measured.
    _, first, column = np.unique(dataset.order, return_index=True, return_inverse=True)
    table = ranks.gathered(_load(stem, len(first)) if ranks.rank == 0 else None)[0]
    _forget_changed(table, dataset, first, progress, ranks)
    todo, reasons = np.flatnonzero(table[0] <= 0), {}
    if len(todo):
        file = _unfinished(stem, table) if ranks.rank == 0 else table
        for records, results in _measured(dataset, first, todo, processes, progress, ranks):
            for record, (*facts, reason) in zip(records, results, strict=True):
                table[:, record] = facts
                if reason:
                    reasons[int(record)] = reason
            file[:, records] = table[:, records]
        if ranks.rank == 0:
            _finish(stem, table)
    bad = [(i, reasons[int(column[i])]) for i in np.flatnonzero(table[0, column] == 0).tolist()]
    tokens, trained, tiles, digests, _ = table if len(dataset) == len(first) else table[:, column]
    return MeasuredDataset(SampleLengths(tokens, trained, tiles), digests, bad)


def lengths_cache_key(dataset: LazySupervisedDataset) -> str:
    """Name of everything that decides the lengths of a data set, the pictures themselves excepted."""
    facts = [
        VERSION,
        type(dataset).__name__,
        dataset.records.version,
        dataset.root if is_remote(dataset.root) else os.path.abspath(dataset.root),
        hashlib.sha256(np.unique(dataset.order).tobytes()).hexdigest(),
        dataset.num_image_token,
        dataset.max_dynamic_patch,
        dataset.tokenizer.model_max_length,
        _tokenizer_facts(dataset.tokenizer),
        [getattr(dataset.data_args, field) for field in FIELDS],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _tokenizer_facts(tokenizer) -> list:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Truncation and padding are how the tokenizer was called last, not what it is.
    content = (
        json.loads(backend.to_str()) | {"truncation": 0, "padding": 0} if backend else sorted(tokenizer.get_vocab())
    )
    return [type(tokenizer).__name__, getattr(tokenizer, "add_bos_token", None), tokenizer.bos_token, content]


# -- measuring ---------------------------------------------------------------------------------------------------------


def _measured(
    dataset, first: np.ndarray, todo: np.ndarray, processes: int, progress: bool, ranks: RankGroup
) -> Iterator[tuple[np.ndarray, list[tuple]]]:
    """(records, [(tokens, trained, tiles, digest, stamp, reason or None)]) of all ranks, round after round."""
    results = _results(dataset, first[todo[ranks.rank :: ranks.world_size]].tolist(), processes)
    with tqdm(total=len(todo), desc=f"measuring {dataset.ds_name}", unit="sample", disable=not progress) as bar:
        for start in range(0, len(todo), ROUND * ranks.world_size):
            together = todo[start : start + ROUND * ranks.world_size]
            mine = []
            for result in islice(results, len(together[ranks.rank :: ranks.world_size])):
                mine.append(result)
                bar.update(ranks.world_size == 1)
            for rank, theirs in enumerate(ranks.gathered(mine)):
                yield together[rank :: ranks.world_size], theirs
            bar.update(len(together) if ranks.world_size > 1 else 0)


def _results(dataset: LazySupervisedDataset, samples: list[int], processes: int) -> Iterator[tuple]:
    """The measurements of these samples, in their order, from so many processes or from this one."""
    workers = min(processes, len(samples) // WORTH_A_PROCESS)
    workers = workers if workers > 1 else 0
    loader = DataLoader(
        _Measurements(dataset),
        sampler=samples,
        batch_size=CHUNK if workers else 1,
        collate_fn=list,
        num_workers=workers,
        # Spawned, not forked: tokenizers and CUDA have threads that do not survive a fork.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # leaves the one of the run as it is
    )
    return chain.from_iterable(loader)


class _Measurements(Dataset):
    """Sample -> its measurement."""

    def __init__(self, dataset: LazySupervisedDataset):
        self.dataset = dataset

    def __getitem__(self, sample: int) -> tuple:
        return _measure_one(self.dataset, sample)


def _end_with_parent(_: int) -> None:
    """A worker that is still starting when its parent is killed does not notice by itself."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _measure_one(dataset: LazySupervisedDataset, sample: int) -> tuple:
    content = dataset.digest(sample), _stamp(dataset, sample)
    try:
        return *dataset.measure(sample), *content, None
    except UnusableSample as reason:
        return 0, 0, 0, *content, str(reason)


def _stamp(dataset: LazySupervisedDataset, sample: int) -> int:
    """A checksum of sizes and times of a sample's pictures, 0 without any; their path is in its record."""
    with suppress(UnusableSample):
        if paths := dataset.paths(sample):
            return zlib.crc32(repr([file_stamp(path) for path in paths]).encode()) - (1 << 31)
    return 0


def _forget_changed(
    table: np.ndarray, dataset: LazySupervisedDataset, first: np.ndarray, progress: bool, ranks: RankGroup
) -> None:
    """Mark the records of the table whose pictures have changed as unknown."""
    known = np.flatnonzero(table[0] > 0)
    mine = tqdm(
        first[known[ranks.rank :: ranks.world_size]].tolist(),
        desc=f"looking for changed pictures of {dataset.ds_name}",
        unit="sample",
        delay=5,
        disable=not progress,
    )
    for rank, stamps in enumerate(ranks.gathered(np.array([_stamp(dataset, sample) for sample in mine], np.int32))):
        records = known[rank :: ranks.world_size]
        table[0, records[stamps != table[4, records]]] = UNKNOWN


# -- on disk -----------------------------------------------------------------------------------------------------------


def _load(stem: Path, records: int) -> np.ndarray:
    """(5, records) int32: tokens, trained tokens, tiles, digests, stamps, as far as they are known."""
    for name in (f"{stem}.npy", f"{stem}.part.npy"):
        with suppress(OSError, ValueError, EOFError):
            table = np.load(name)
            if table.shape == (5, records) and table.dtype == np.int32:
                return table
    return np.full((5, records), UNKNOWN, np.int32)


def _unfinished(stem: Path, table: np.ndarray) -> np.ndarray:
    """A copy of the table as a file that is written to while measuring."""
    write_atomically(f"{stem}.part.npy", lambda file: np.save(file, table))
    return np.load(f"{stem}.part.npy", mmap_mode="r+")


def _finish(stem: Path, table: np.ndarray) -> None:
    write_atomically(f"{stem}.npy", lambda file: np.save(file, table))
    Path(f"{stem}.part.npy").unlink(missing_ok=True)
