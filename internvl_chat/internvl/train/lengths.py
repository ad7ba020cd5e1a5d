"""Measure every sample before training: tokens, trained tokens, tiles, and which samples cannot be used.

Stands between `dataset.py` and `plan.py`. Works from text and image headers only, in parallel, once: the result is kept
on disk under a fingerprint of everything that decides it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from internvl.train.constants import BadSample
from internvl.train.dataset import LazySupervisedDataset
from internvl.train.files import cache_folder, is_remote, write_whole

VERSION = 1  # of the files; to be raised whenever samples of the same data change
CHUNK = 256  # samples a process measures at a time
WORTH_A_PROCESS = 4000  # samples for which it pays to start one, which takes seconds
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


class Lengths(NamedTuple):
    """Tokens, trained tokens and tiles of each sample of a data set, (N,) int32 each; 0 where a sample cannot be used.

    `bad` lists the latter: (index, reason).
    """

    tokens: np.ndarray
    trained: np.ndarray
    tiles: np.ndarray
    bad: list[tuple[int, str]]


def measure(
    dataset: LazySupervisedDataset, num_workers: int = 0, cache_dir: str | None = None, progress: bool = True
) -> Lengths:
    """Lengths of all samples, as `dataset.get` produces them in any epoch.

    What is kept on disk is trusted except for unusable samples: those are looked at again, since files may have been
    mended.

    Args:
        num_workers: processes to use at most; below 2 this process measures.
        cache_dir: folder for results; by default $INTERNVL_CACHE, else ~/.cache/internvl_chat.
        progress: show a bar.

    Raises:
        ValueError: the folder cannot be written.
    """
    stem = Path(cache_dir or cache_folder()) / f"lengths-{fingerprint(dataset)}"
    # Repeats of a record are as long as its first appearance: only that is measured.
    _, first, column = np.unique(dataset.order, return_index=True, return_inverse=True)
    records = len(first)
    table, reasons = _load(stem, records) or (np.zeros((3, records), np.int32), {})
    todo = sorted(reasons) if table.any() else range(records)
    if todo:
        table, reasons = table.copy(), {}
        measured = _measured(dataset, [int(first[record]) for record in todo], num_workers, progress)
        for record, (*lengths, reason) in zip(todo, measured, strict=True):
            table[:, record] = lengths
            if reason:
                reasons[record] = reason
        _save(stem, table, reasons)
    bad = [(i, reasons[int(column[i])]) for i in np.flatnonzero(table[0, column] == 0).tolist()]
    return Lengths(*(table if len(dataset) == records else table[:, column]), bad)


def fingerprint(dataset: LazySupervisedDataset) -> str:
    """Name of everything that decides the lengths of a data set, the pictures themselves excepted."""
    path = os.path.abspath(dataset.records.file)
    facts = [
        VERSION,
        type(dataset).__name__,
        path,
        os.stat(path).st_size,
        os.stat(path).st_mtime_ns,
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


def _measured(dataset, records: Sequence[int], num_workers: int, progress: bool) -> Iterable[tuple]:
    """(tokens, trained, tiles, reason or None) of each record, in order."""
    processes = min(num_workers, len(records) // WORTH_A_PROCESS)
    with tqdm(total=len(records), desc=f"measuring {dataset.ds_name}", unit="sample", disable=not progress) as bar:
        if processes < 2:
            for record in records:
                yield _measure_one(dataset, record)
                bar.update()
            return
        chunks = [records[start : start + CHUNK] for start in range(0, len(records), CHUNK)]
        # Spawned, not forked: tokenizers and CUDA have threads that do not survive a fork.
        context = get_context("spawn")
        with ProcessPoolExecutor(processes, context, initializer=_Worker.start, initargs=(dataset,)) as pool:
            for results in pool.map(_Worker.measure, chunks):
                yield from results
                bar.update(len(results))


class _Worker:
    """A process of the pool: receives the data set once."""

    dataset: LazySupervisedDataset

    @classmethod
    def start(cls, dataset: LazySupervisedDataset) -> None:
        cls.dataset = dataset

    @classmethod
    def measure(cls, records: Sequence[int]) -> list[tuple]:
        return [_measure_one(cls.dataset, record) for record in records]


def _measure_one(dataset: LazySupervisedDataset, record: int) -> tuple:
    try:
        return *dataset.measure(record), None
    except BadSample as reason:
        return 0, 0, 0, str(reason)


# -- on disk -----------------------------------------------------------------------------------------------------------


def _load(stem: Path, records: int) -> tuple[np.ndarray, dict[int, str]] | None:
    """Table (3, records), memory-mapped, and reasons by record; None when they are not there or not whole."""
    try:
        table = np.load(f"{stem}.npy", mmap_mode="r")
        reasons = {int(record): reason for record, reason in json.loads(Path(f"{stem}.json").read_text()).items()}
    except (OSError, ValueError, EOFError):
        return None
    whole = table.shape == (3, records) and set(np.flatnonzero(table[0] == 0).tolist()) == reasons.keys()
    return (table, reasons) if whole else None


def _save(stem: Path, table: np.ndarray, reasons: dict[int, str]) -> None:
    write_whole(f"{stem}.json", lambda file: file.write(json.dumps(reasons).encode()))
    write_whole(f"{stem}.npy", lambda file: np.save(file, table))
