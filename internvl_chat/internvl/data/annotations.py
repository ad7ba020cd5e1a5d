"""Annotation files as sequences of records: JSONL, Parquet and Arrow.

Loading a sample starts here: `open_annotations(path)[17]` is a dict. Records stay on disk and are read one by one in
random order. A remote JSONL file is therefore first copied to the cache.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from glob import escape, glob
from typing import Any

import numpy as np

from internvl.constants import UnusableSample
from internvl.data.file_io import fetch_local_copy, get_cache_dir, is_remote, write_atomically

SCAN_CHUNK_BYTES = 1 << 24  # read at a time while looking for line breaks
LARGE_FILE_BYTES = 1 << 26  # files of at least this size keep their line table on disk
DECOMPRESSION_COMMANDS = {".gz": "gunzip", ".zst": "zstd -d", ".bz2": "bunzip2", ".xz": "unxz"}


class AnnotationFile(ABC):
    """A sequence of records on disk.

    Safe to share with forked dataloader workers and to pickle to spawned ones.

    Attributes:
        path: the file or folder as the user wrote it.
    """

    path: str

    @property
    @abstractmethod
    def version(self) -> list:
        """JSON-serializable identity of the content: path, sizes and modification times."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of records."""

    @abstractmethod
    def __getitem__(self, index: int) -> dict:
        """Parse record `index`; raises UnusableSample if it is malformed."""

    @abstractmethod
    def read_bytes(self, index: int) -> bytes:
        """Read record `index` without parsing it; equal content gives equal bytes."""

    @abstractmethod
    def line_number(self, index: int) -> int:
        """Return the line or table row of record `index`, from 1."""


def open_annotations(path: str) -> AnnotationFile:
    """Open a JSONL file or a table, depending on `path`.

    Raises:
        ValueError: the file does not exist, fetching it failed, or its format is not supported.
    """
    return TableFile(path) if is_table(path) else JsonlFile(path)


def is_table(path: str) -> bool:
    """Return whether `path` is a local Parquet file, Arrow file or folder."""
    return not is_remote(path) and (path.endswith((".parquet", ".arrow")) or os.path.isdir(path))


class JsonlFile(AnnotationFile):
    """A file with one JSON object per line, read by byte offset.

    Blank lines are skipped. The line table of a large file is computed once and cached on disk. It is memory-mapped, so
    workers share one copy.

    Attributes:
        local_path: the file that is read: `path`, or the cached copy of a remote file.

    Raises:
        ValueError: the file does not exist, fetching it failed, or its name does not end in `jsonl`.
    """

    def __init__(self, path: str):
        extension = os.path.splitext(path)[1]
        if extension in DECOMPRESSION_COMMANDS:
            raise ValueError(
                f"annotation file {path} is compressed, but its records are read in random order: unpack it first "
                f"({DECOMPRESSION_COMMANDS[extension]} {path})."
            )
        if not path.endswith("jsonl"):
            raise ValueError(
                f"annotation file {path} is not supported: it must be a .jsonl file (one JSON object per line), a "
                ".parquet or .arrow file, or a folder saved by the datasets library."
            )
        if not is_remote(path):
            _require_existing(path, os.path.isfile(path))
        self.path, self.local_path = path, fetch_local_copy(path)
        table_name = hashlib.sha256(json.dumps(self.version).encode()).hexdigest()[:24]
        is_large = os.path.getsize(self.local_path) >= LARGE_FILE_BYTES
        self._table_path = str(get_cache_dir() / f"lines-{table_name}.npy") if is_large else None
        self._line_table = self._load_line_table()
        self._open_file = None

    @property
    def version(self) -> list:
        return _get_file_version(os.path.abspath(self.local_path))

    def _load_line_table(self) -> np.ndarray:
        """Scan the lines, or memory-map the cached table of a large file."""
        if not self._table_path:
            return _scan_lines(self.local_path)
        with suppress(OSError, ValueError, EOFError):  # not cached yet, or a damaged file
            table = np.load(self._table_path, mmap_mode="r")
            if table.ndim == 2 and len(table) == 3:
                return table
        table = _scan_lines(self.local_path)
        write_atomically(self._table_path, lambda file: np.save(file, table))
        return np.load(self._table_path, mmap_mode="r")

    def __len__(self) -> int:
        return self._line_table.shape[1]

    def __getitem__(self, index: int) -> dict:
        try:
            record = json.loads(self.read_bytes(index))
        except ValueError as error:  # invalid JSON or invalid UTF-8
            raise UnusableSample(f"line {self.line_number(index)} is not JSON: {error}") from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UnusableSample(f"line {self.line_number(index)}: expected a JSON object, got {kind}")
        return record

    def read_bytes(self, index: int) -> bytes:
        if self._open_file is None:
            self._open_file = open(self.local_path, "rb", buffering=0)  # noqa: SIM115 (stays open)
        start, end = (int(offset) for offset in self._line_table[:2, index])
        # pread, not seek and read: forked workers share one file position.
        return os.pread(self._open_file.fileno(), end - start, start)

    def line_number(self, index: int) -> int:
        return int(self._line_table[2, index])

    def __getstate__(self) -> dict:
        # A memory-mapped table is not copied: the process that unpickles this opens it again.
        return self.__dict__ | {"_open_file": None} | ({"_line_table": None} if self._table_path else {})

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        if state["_line_table"] is None:
            self._line_table = self._load_line_table()


def _scan_lines(path: str) -> np.ndarray:
    """Find the lines of a JSONL file that hold a record.

    Returns:
        int64 (3, num_records): first byte, byte after the last, and line number from 1.
    """
    newlines, size = [], 0
    with open(path, "rb") as file:
        while chunk := file.read(SCAN_CHUNK_BYTES):
            newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
    # The last line may have no line break.
    ends = np.concatenate([*newlines, [size]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    if len(one_byte := np.flatnonzero(lengths == 1)):  # a lone \r is a blank line of a file with \r\n
        lengths[one_byte] -= np.memmap(path, np.uint8, "r")[starts[one_byte]] == ord("\r")
    lines = np.flatnonzero(lengths)
    return np.stack([starts[lines], ends[lines], lines + 1])


class TableFile(AnnotationFile):
    """The rows of a Parquet or Arrow table.

    `path` is a `.parquet` or `.arrow` file, a folder of `.parquet` files, or a folder that
    `datasets.Dataset.save_to_disk` wrote.

    Raises:
        ValueError: the table does not exist or cannot be opened.
    """

    def __init__(self, path: str):
        import datasets

        _require_existing(path, os.path.exists(path))
        self.path = path
        datasets.disable_progress_bars()
        self._table: Any
        parquet_files = sorted(glob(os.path.join(escape(path), "*.parquet"))) if os.path.isdir(path) else [path]
        try:
            if path.endswith(".arrow"):
                self._table = datasets.Dataset.from_file(path)
            elif os.path.isdir(path) and not parquet_files:
                self._table = datasets.load_from_disk(path)
            else:
                # pyrefly: ignore[bad-argument-type]  # strings are paths, too
                self._table = datasets.Dataset.from_parquet(parquet_files, cache_dir=str(get_cache_dir() / "tables"))
        except Exception as error:  # pyarrow and datasets raise many types of their own
            raise ValueError(f"annotation file {path} cannot be opened as a table: {error}") from error
        if not isinstance(self._table, datasets.Dataset):  # a DatasetDict
            splits = ", ".join(map(str, self._table))
            raise ValueError(f"annotation file {path} has several splits ({splits}): pass the folder of one split.")
        self._source_files = parquet_files or sorted(entry["filename"] for entry in self._table.cache_files)

    @property
    def version(self) -> list:
        return [os.path.abspath(self.path), len(self), [_get_file_version(file) for file in self._source_files]]

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict:
        # A table has None where a record lacks a column; in JSONL the key is absent.
        return {key: value for key, value in self._table[int(index)].items() if value is not None}

    def read_bytes(self, index: int) -> bytes:
        return json.dumps(self[index], sort_keys=True, default=repr).encode()

    def line_number(self, index: int) -> int:
        return int(index) + 1


def _require_existing(path: str, exists: bool) -> None:
    if not exists:
        raise ValueError(f"annotation file {path} does not exist (relative paths start at {os.getcwd()}).")


def _get_file_version(path: str) -> list:
    """Return [path, bytes, modification time in ns]."""
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns]
