"""Records of an annotation file by number: the file stays on disk, and so does the table of its lines.

First station of the data path: `dataset.py` asks for record i and gets a dict. A remote file is copied to the cache
once, since records are read one by one and in random order. Tables are `arrow.py`'s.
"""

import hashlib
import json
import os
from contextlib import suppress
from glob import escape, glob

import numpy as np

from internvl.constants import UnusableSample
from internvl.data.file_io import fetch_local_copy, get_cache_dir, is_remote, write_atomically

CHUNK = 1 << 24
LARGE = 1 << 26  # bytes from which on it pays to keep the table of lines on disk
COMPRESSED = {".gz": "gunzip", ".zst": "zstd -d", ".bz2": "bunzip2", ".xz": "unxz"}


class JsonlFile:
    """A file with one JSON object per line, read by byte offset. Blank lines hold no record.

    The offsets in a large file are found once and kept in the cache, memory-mapped: neither they nor the file are
    copied into workers. Safe to share between forked workers and to pickle.

    Attributes:
        path: the file as named by the user.
        file: the file that is read: the same, or the copy of a remote one.

    Raises:
        ValueError: when the file does not exist, cannot be fetched or is not named `*.jsonl`.
    """

    def __init__(self, path: str):
        ending = os.path.splitext(path)[1]
        if ending in COMPRESSED:
            raise ValueError(
                f"annotation {path} is compressed; its records are read in random order: unpack it first "
                f"({COMPRESSED[ending]} {path})."
            )
        if not path.endswith("jsonl"):
            raise ValueError(
                f"annotation {path} must be a .jsonl file: one JSON object per line; or a .parquet or .arrow file or a "
                "folder that the datasets library saved."
            )
        if not is_remote(path) and not os.path.isfile(path):
            raise ValueError(f"annotation {path} does not exist (relative paths start at {os.getcwd()}).")
        self.path, self.file = path, fetch_local_copy(path)
        name = hashlib.sha256(json.dumps(self.version).encode()).hexdigest()[:24]
        self._table_file = str(get_cache_dir() / f"lines-{name}.npy") if self.version[1] >= LARGE else None
        self._table = self._open_table()
        self._open_file = None

    @property
    def version(self) -> list:
        """What tells this content of the file from another."""
        status = os.stat(self.file)
        return [os.path.abspath(self.file), status.st_size, status.st_mtime_ns]

    def _open_table(self) -> np.ndarray:
        """(3, records): first byte, the byte behind the last, and number of each line; memory-mapped if large."""
        if not self._table_file:
            return _line_table(self.file)
        with suppress(OSError, ValueError, EOFError):
            table = np.load(self._table_file, mmap_mode="r")
            if table.ndim == 2 and len(table) == 3:
                return table
        table = _line_table(self.file)
        write_atomically(self._table_file, lambda file: np.save(file, table))
        return np.load(self._table_file, mmap_mode="r")

    def __len__(self) -> int:
        return self._table.shape[1]

    def __getitem__(self, index: int) -> dict:
        """Record number `index`; BadSample when its line is not a JSON object."""
        try:
            record = json.loads(self.content(index))
        except ValueError as error:  # wrong JSON as well as wrong UTF-8
            raise UnusableSample(f"line {self.line(index)} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise UnusableSample(f"line {self.line(index)} is a JSON {type(record).__name__}, not an object")
        return record

    def content(self, index: int) -> bytes:
        """The line of record `index`."""
        if self._open_file is None:
            self._open_file = open(self.file, "rb", buffering=0)  # noqa: SIM115 (stays open)
        # pread, not seek and read: forked workers share one file position.
        start, end = (int(offset) for offset in self._table[:2, index])
        return os.pread(self._open_file.fileno(), end - start, start)

    def line(self, index: int) -> int:
        """Number of the line that holds record `index`, counted from 1."""
        return int(self._table[2, index])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open_file": None} | ({"_table": None} if self._table_file else {})

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        if self._table is None:
            self._table = self._open_table()


def _line_table(path: str) -> np.ndarray:
    """(3, records) as `JsonlFile` keeps it; lines without a record are left out."""
    newlines, size = [], 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
    ends = np.concatenate([*newlines, [size]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    if len(single := np.flatnonzero(lengths == 1)):  # a lone \r is the rest of a blank line
        lengths[single] -= np.memmap(path, np.uint8, "r")[starts[single]] == ord("\r")
    records = np.flatnonzero(lengths)
    return np.stack([starts[records], ends[records], records + 1])


class TableFile:
    """Rows of a `.parquet` or `.arrow` file, of a folder of `.parquet` files, or of a folder that
    `datasets.Dataset.save_to_disk` wrote.

    Attributes:
        path: as named by the user. file: the same.
        version: what tells this content from another.

    Raises:
        ValueError: it cannot be opened.
    """

    def __init__(self, path: str):
        import datasets

        self.path = self.file = path
        if not os.path.exists(path):
            raise ValueError(f"annotation {path} does not exist (relative paths start at {os.getcwd()}).")
        datasets.disable_progress_bars()
        parquet = sorted(glob(os.path.join(escape(path), "*.parquet"))) if os.path.isdir(path) else [path]
        try:
            if path.endswith(".arrow"):
                self.rows = datasets.Dataset.from_file(path)
            elif os.path.isdir(path) and not parquet:
                self.rows = datasets.load_from_disk(path)
            else:
                self.rows = datasets.Dataset.from_parquet(parquet, cache_dir=str(get_cache_dir() / "tables"))
        except Exception as error:  # pyarrow and datasets have many of their own
            raise ValueError(f"annotation {path} cannot be opened as a table: {error}") from error
        if not isinstance(self.rows, datasets.Dataset):
            raise ValueError(f"annotation {path} holds several splits, {', '.join(self.rows)}: name the folder of one.")
        self.version = [os.path.abspath(path), len(self.rows), [_status(file) for file in self._files(parquet)]]

    def _files(self, parquet: list[str]) -> list[str]:
        return parquet or sorted(entry["filename"] for entry in self.rows.cache_files)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {key: value for key, value in self.rows[int(index)].items() if value is not None}

    def content(self, index: int) -> bytes:
        """What a row says, the same bytes for the same content."""
        return json.dumps(self[index], sort_keys=True, default=repr).encode()

    def line(self, index: int) -> int:
        """Number of a row, counted from 1."""
        return int(index) + 1


def is_table(path: str) -> bool:
    return not is_remote(path) and (path.endswith((".parquet", ".arrow")) or os.path.isdir(path))


def _status(file: str) -> list:
    status = os.stat(file)
    return [file, status.st_size, status.st_mtime_ns]
