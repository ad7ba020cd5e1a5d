"""Measure every sample before training: tokens, loss tokens, tiles, unusable samples.

Only text and image headers are read. All processes of all ranks share the work. Results are cached on disk under a hash
of everything that determines them, and an interrupted measurement resumes from the cache.
"""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.recfunctions import repack_fields
from torch.utils.data import DataLoader, Dataset

from internvl.constants import UnusableSample
from internvl.data.disk_cache import find_cache_file, get_cache_dir, write_cache_file
from internvl.data.file_io import get_size_and_mtime, is_remote
from internvl.data.record_identity import hash_record
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.epoch_plan import SAMPLE_LENGTHS
from internvl.progress import Progress
from internvl.runtime.dataloader_workers import SpawnableDataset, start_worker

CACHE_VERSION = 7  # of the cached files; raise it whenever samples of the same data change
SAMPLES_PER_TASK = 256  # samples that a worker process measures at a time
SAMPLES_PER_ROUND = 16384  # samples per rank after which results are exchanged
SECONDS_PER_SAVE = 30  # of measuring, after which results are cached
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
    "max_image_pixels",
    "upstream_image_decoding",
    "keep_surplus_placeholders",
)
# Measurement of a record. `lost_loss_tokens`, `content_hash`: see `MeasuredDataset`. `file_stamp`: CRC-32 of sizes and
# modification times of its media files, shifted to the range of int32; 0 without any.
MEASUREMENT = np.dtype(
    [*SAMPLE_LENGTHS.descr, ("lost_loss_tokens", np.int32), ("file_stamp", np.int32), ("content_hash", np.int64)]
)
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
        lost_loss_tokens: (N,) int32, the loss tokens of each sample that truncation to `--max_seq_length` cuts off.
        content_hashes: (N,) int64, see `hash_record`.
    """

    lengths: np.ndarray
    digests: np.ndarray
    unusable: list[tuple[int, str]]
    lost_loss_tokens: np.ndarray
    content_hashes: np.ndarray

    def select(self, indices: np.ndarray) -> "MeasuredDataset":
        """Select the measurements of some of the samples, for `LazySupervisedDataset.select`."""
        positions = np.full(len(self.lengths), -1)
        positions[indices] = np.arange(len(indices))
        return MeasuredDataset(
            lengths=self.lengths[indices],
            digests=self.digests[indices],
            unusable=[(int(positions[index]), reason) for index, reason in self.unusable if positions[index] >= 0],
            lost_loss_tokens=self.lost_loss_tokens[indices],
            content_hashes=self.content_hashes[indices],
        )


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
    _require_equal_records(dataset, rank_group)
    stem = os.path.join(cache_dir or get_cache_dir(), f"lengths-{make_lengths_cache_key(dataset)}")
    # A record that several samples have (`repeat_time`) is measured once, for the first of them.
    # first_samples: (R,) of each record; row_of_sample: (N,) its row in the table of records.
    _, first_samples, row_of_sample = np.unique(dataset.record_indices, return_index=True, return_inverse=True)
    table = rank_group.gather_fn(_load_table(stem, len(first_samples)) if rank_group.rank == 0 else None)[0]
    _mark_changed_files(table, dataset, first_samples, show_progress, rank_group)

    todo, reasons = np.flatnonzero(table["tokens"] <= UNUSABLE), {}
    time_of_save = time.monotonic()
    for rows, results in _measure_in_rounds(dataset, first_samples, todo, num_processes, show_progress, rank_group):
        for row, (measurement, reason) in zip(rows.tolist(), results, strict=True):
            table[row] = measurement
            if reason:
                reasons[row] = reason
        if rank_group.rank == 0 and time.monotonic() - time_of_save >= SECONDS_PER_SAVE:
            _save_table(stem, table)
            time_of_save = time.monotonic()
    if len(todo) and rank_group.rank == 0:
        _save_table(stem, table)

    measurements = table[row_of_sample]  # (N,)
    unusable = np.flatnonzero(measurements["tokens"] == UNUSABLE).tolist()
    checksums = dataset.annotations.checksums[dataset.record_indices]  # (N,) uint32
    return MeasuredDataset(
        lengths=repack_fields(measurements[list(SAMPLE_LENGTHS.names)]),
        digests=(checksums.astype(np.int64) - (1 << 31)).astype(np.int32),
        unusable=[(sample, reasons[int(row_of_sample[sample])]) for sample in unusable],
        lost_loss_tokens=np.ascontiguousarray(measurements["lost_loss_tokens"]),
        content_hashes=np.ascontiguousarray(measurements["content_hash"]),
    )


def _require_equal_records(dataset: LazySupervisedDataset, rank_group: RankGroup) -> None:
    """Raise ValueError, on every rank, if the ranks have opened different records."""
    content_ids = rank_group.gather_fn(dataset.annotations.content_id)
    for rank, content_id in enumerate(content_ids):
        if content_id != content_ids[0]:
            raise ValueError(
                f"dataset {dataset.ds_name}: the records of {dataset.annotations.path} differ between rank 0 and rank "
                f"{rank}. Copy the same file to all nodes, and do not change it while a run starts."
            )


def make_lengths_cache_key(dataset: LazySupervisedDataset) -> str:
    """Hash everything that determines a dataset's lengths, except media files."""
    key_parts = [
        CACHE_VERSION,
        type(dataset).__name__,
        dataset.annotations.content_id,
        dataset.root if is_remote(dataset.root) else os.path.abspath(dataset.root),
        hashlib.sha256(np.unique(dataset.record_indices).tobytes()).hexdigest(),
        dataset.num_image_token,
        sorted(dataset.untrained_tokens),
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

# a row of MEASUREMENT, and the reason if the sample is unusable
Result = tuple[tuple[int, int, int, int, int, int], str | None]


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
        SpawnableDataset(_MeasurementDataset(dataset)),
        sampler=samples,
        batch_size=SAMPLES_PER_TASK if workers else 1,
        collate_fn=list,
        num_workers=workers,
        # Spawned, not forked: tokenizers and CUDA have threads that do not survive a fork.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else the loader would draw from the global generator and change the run
    )
    return chain.from_iterable(loader)


class _MeasurementDataset(Dataset):
    """Measurements of samples, for a DataLoader."""

    def __init__(self, dataset: LazySupervisedDataset):
        self.dataset = dataset

    def __getitem__(self, sample: int) -> Result:
        return _measure_sample(self.dataset, sample)


def _measure_sample(dataset: LazySupervisedDataset, sample: int) -> Result:
    stamp, content_hash = _stamp_files(dataset, sample), hash_record(dataset, sample)
    try:
        return (*dataset.measure(sample), stamp, content_hash), None
    except UnusableSample as error:
        return (UNUSABLE, 0, 0, 0, stamp, content_hash), str(error)


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


def _load_table(stem: str, num_records: int) -> np.ndarray:
    """Load the complete or partial table, or create a new one.

    Returns:
        (num_records,) of MEASUREMENT.
    """
    if path := find_cache_file(stem, ".npy"):
        with suppress(OSError, ValueError):  # another run has just replaced it
            table = np.load(path)
            if table.shape == (num_records,) and table.dtype == MEASUREMENT:
                return table
    table = np.zeros(num_records, MEASUREMENT)
    table["tokens"] = NOT_MEASURED
    return table


def _save_table(stem: str, table: np.ndarray) -> None:
    write_cache_file(stem, ".npy", lambda file: np.save(file, table))
