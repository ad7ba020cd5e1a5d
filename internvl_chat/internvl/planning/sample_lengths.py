"""Measure every sample before training: tokens, loss tokens, tiles, unusable samples.

Only text and image headers are read. All processes of all ranks share the work. Results are cached on disk under a hash
of everything that determines them, and an interrupted measurement resumes from the cache.
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
from numpy.lib.recfunctions import repack_fields
from torch.utils.data import DataLoader, Dataset

from internvl.constants import UnusableSample
from internvl.data.file_io import get_cache_dir, get_size_and_mtime, is_remote, write_atomically
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.epoch_plan import SAMPLE_LENGTHS
from internvl.progress import Progress

CACHE_VERSION = 4  # of the cached files; raise it whenever samples of the same data change
SAMPLES_PER_TASK = 256  # samples that a worker process measures at a time
SAMPLES_PER_ROUND = 16384  # samples per rank after which results are exchanged and cached
MIN_SAMPLES_PER_PROCESS = 4000  # with fewer samples, starting a process takes longer than measuring
# Fields of DataTrainingArguments that determine lengths.
LENGTH_FIELDS = (
    "conv_style",
    "force_image_size",
    "dynamic_image_size",
    "use_thumbnail",
    "min_dynamic_patch",
    "min_num_frame",
    "max_num_frame",
)
# Measurement of a record. `digest`: CRC-32 of the record. `file_stamp`: CRC-32 of sizes and modification times of its
# media files, 0 without any. Both are shifted to the range of int32.
MEASUREMENT = np.dtype([*SAMPLE_LENGTHS.descr, ("digest", np.int32), ("file_stamp", np.int32)])
# Values of the column `tokens` for samples that are not measured yet, and for unusable ones.
NOT_MEASURED, UNUSABLE = -1, 0


class RankGroup(NamedTuple):
    """The ranks that measure together.

    `gather_fn(value)` returns the list of all ranks' values, on every rank.
    """

    rank: int = 0
    world_size: int = 1
    gather_fn: Callable[[Any], list] = lambda value: [value]


SINGLE_RANK = RankGroup()


class MeasuredDataset(NamedTuple):
    """Measurements of the samples of a dataset.

    Attributes:
        lengths: (N,) of SAMPLE_LENGTHS; zeros where a sample is unusable.
        digests: (N,) int32, a checksum of each record.
        unusable: (index, reason) of each unusable sample.
    """

    lengths: np.ndarray
    digests: np.ndarray
    unusable: list[tuple[int, str]]


def measure_dataset(
    dataset: LazySupervisedDataset,
    num_processes: int = 0,
    cache_dir: str | None = None,
    show_progress: bool = True,
    rank_group: RankGroup = SINGLE_RANK,
) -> MeasuredDataset:
    """Measure all samples of a dataset.

    The results hold for `dataset.get` in every epoch. Cached results are used, with two exceptions that are measured
    again: unusable samples, whose files may have been repaired, and samples whose media files have another size or
    modification time.

    Args:
        num_processes: maximum number of worker processes of this rank; below 2 none are started.
        cache_dir: default $INTERNVL_CACHE, else ~/.cache/internvl_chat. Only rank 0 uses it.

    Raises:
        ValueError: the cache is not writable.
    """
    stem = Path(cache_dir or get_cache_dir()) / f"lengths-{make_lengths_cache_key(dataset)}"
    # A record that several samples have (`repeat_time`) is measured once, for the first of them.
    # first_samples: (R,) of each record; row_of_sample: (N,) its row in the table of records.
    _, first_samples, row_of_sample = np.unique(dataset.record_indices, return_index=True, return_inverse=True)
    table = rank_group.gather_fn(_load_table(stem, len(first_samples)) if rank_group.rank == 0 else None)[0]
    _mark_changed_files(table, dataset, first_samples, show_progress, rank_group)

    todo, reasons = np.flatnonzero(table["tokens"] <= UNUSABLE), {}
    if len(todo):
        file = _open_partial_table(stem, table) if rank_group.rank == 0 else table
        rounds = _measure_in_rounds(dataset, first_samples, todo, num_processes, show_progress, rank_group)
        for rows, results in rounds:
            for row, (measurement, reason) in zip(rows.tolist(), results, strict=True):
                table[row] = measurement
                if reason:
                    reasons[row] = reason
            file[rows] = table[rows]
        if rank_group.rank == 0:
            _save_table(stem, table)

    measurements = table[row_of_sample]  # (N,)
    unusable = np.flatnonzero(measurements["tokens"] == UNUSABLE).tolist()
    return MeasuredDataset(
        lengths=repack_fields(measurements[list(SAMPLE_LENGTHS.names)]),
        digests=np.ascontiguousarray(measurements["digest"]),
        unusable=[(sample, reasons[int(row_of_sample[sample])]) for sample in unusable],
    )


def make_lengths_cache_key(dataset: LazySupervisedDataset) -> str:
    """Hash everything that determines a dataset's lengths, except media files."""
    key_parts = [
        CACHE_VERSION,
        type(dataset).__name__,
        dataset.annotations.version,
        dataset.root if is_remote(dataset.root) else os.path.abspath(dataset.root),
        hashlib.sha256(np.unique(dataset.record_indices).tobytes()).hexdigest(),
        dataset.num_image_token,
        dataset.max_dynamic_patch,
        dataset.tokenizer.model_max_length,
        _describe_tokenizer(dataset.tokenizer),
        [getattr(dataset.data_args, field) for field in LENGTH_FIELDS],
    ]
    return hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()[:24]


def _describe_tokenizer(tokenizer) -> list:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend:
        # Truncation and padding are settings of the last call, not properties of the tokenizer.
        content = json.loads(backend.to_str()) | {"truncation": 0, "padding": 0}
    else:
        content = sorted(tokenizer.get_vocab())
    return [type(tokenizer).__name__, getattr(tokenizer, "add_bos_token", None), tokenizer.bos_token, content]


# -- measuring ---------------------------------------------------------------------------------------------------------

# (tokens, loss tokens, tiles, digest, file stamp), and the reason if the sample is unusable
Result = tuple[tuple[int, int, int, int, int], str | None]


def _measure_in_rounds(
    dataset: LazySupervisedDataset,
    first_samples: np.ndarray,
    todo: np.ndarray,
    num_processes: int,
    show_progress: bool,
    rank_group: RankGroup,
) -> Iterator[tuple[np.ndarray, list[Result]]]:
    """Measure the rows `todo` on all ranks, round after round.

    Yields:
        Rows of the table that one rank has measured, and their results; the same on every rank.
    """
    rank, world_size = rank_group.rank, rank_group.world_size
    results = _measure_samples(dataset, first_samples[todo[rank::world_size]].tolist(), num_processes)
    with Progress(len(todo), f"Measuring {dataset.ds_name}", is_shown=show_progress) as progress:
        for start in range(0, len(todo), SAMPLES_PER_ROUND * world_size):
            rows = todo[start : start + SAMPLES_PER_ROUND * world_size]
            results_of_rank = []
            for result in islice(results, len(rows[rank::world_size])):
                results_of_rank.append(result)
                progress.update(int(world_size == 1))
            for other, results_of_other in enumerate(rank_group.gather_fn(results_of_rank)):
                yield rows[other::world_size], results_of_other
            progress.update(len(rows) if world_size > 1 else 0)


def _measure_samples(dataset: LazySupervisedDataset, samples: list[int], num_processes: int) -> Iterator[Result]:
    """Measure samples in order; use worker processes if there are many."""
    workers = min(num_processes, len(samples) // MIN_SAMPLES_PER_PROCESS)
    workers = workers if workers > 1 else 0
    loader = DataLoader(
        _MeasurementDataset(dataset),
        sampler=samples,
        batch_size=SAMPLES_PER_TASK if workers else 1,
        collate_fn=list,
        num_workers=workers,
        # Spawned, not forked: tokenizers and CUDA have threads that do not survive a fork.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_exit_with_parent,
        generator=torch.Generator(),  # else the loader would draw from the global generator and change the run
    )
    return chain.from_iterable(loader)


class _MeasurementDataset(Dataset):
    """Measurements of samples, for a DataLoader."""

    def __init__(self, dataset: LazySupervisedDataset):
        self.dataset = dataset

    def __getitem__(self, sample: int) -> Result:
        return _measure_sample(self.dataset, sample)


def _exit_with_parent(_: int) -> None:
    """Exit a worker when its parent is killed, even while starting."""

    def wait_for_parent() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _measure_sample(dataset: LazySupervisedDataset, sample: int) -> Result:
    stamps = dataset.checksum_record(sample), _stamp_files(dataset, sample)
    try:
        return (*dataset.measure(sample), *stamps), None
    except UnusableSample as error:
        return (UNUSABLE, 0, 0, *stamps), str(error)


def _stamp_files(dataset: LazySupervisedDataset, sample: int) -> int:
    """Compute a checksum of sizes and modification times of media files.

    It is 0 for a sample without media files, or with an invalid record.
    """
    with suppress(UnusableSample):
        if paths := dataset.list_media_paths(sample):
            return zlib.crc32(repr([get_size_and_mtime(path) for path in paths]).encode()) - (1 << 31)
    return 0


def _mark_changed_files(
    table: np.ndarray,
    dataset: LazySupervisedDataset,
    first_samples: np.ndarray,
    show_progress: bool,
    rank_group: RankGroup,
) -> None:
    """Mark rows whose media files have changed as not measured."""
    measured = np.flatnonzero(table["tokens"] > UNUSABLE)
    samples = first_samples[measured[rank_group.rank :: rank_group.world_size]].tolist()
    stamps_of_rank = np.empty(len(samples), np.int32)
    with Progress(len(samples), f"Checking for changed files of {dataset.ds_name}", is_shown=show_progress) as progress:
        for index, sample in enumerate(samples):
            stamps_of_rank[index] = _stamp_files(dataset, sample)
            progress.update()
    for rank, stamps in enumerate(rank_group.gather_fn(stamps_of_rank)):
        rows = measured[rank :: rank_group.world_size]
        table["tokens"][rows[stamps != table["file_stamp"][rows]]] = NOT_MEASURED


# -- on disk -----------------------------------------------------------------------------------------------------------


def _load_table(stem: Path, num_records: int) -> np.ndarray:
    """Load the complete or partial table, or create a new one.

    Returns:
        (num_records,) of MEASUREMENT.
    """
    for path in (f"{stem}.npy", f"{stem}.part.npy"):
        with suppress(OSError, ValueError, EOFError):
            table = np.load(path)
            if table.shape == (num_records,) and table.dtype == MEASUREMENT:
                return table
    table = np.zeros(num_records, MEASUREMENT)
    table["tokens"] = NOT_MEASURED
    return table


def _open_partial_table(stem: Path, table: np.ndarray) -> np.ndarray:
    """Copy the table into a memory-mapped file, which is updated while measuring."""
    write_atomically(f"{stem}.part.npy", lambda file: np.save(file, table))
    return np.load(f"{stem}.part.npy", mmap_mode="r+")


def _save_table(stem: Path, table: np.ndarray) -> None:
    write_atomically(f"{stem}.npy", lambda file: np.save(file, table))
    Path(f"{stem}.part.npy").unlink(missing_ok=True)
