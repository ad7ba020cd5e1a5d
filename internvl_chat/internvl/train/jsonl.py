"""Records of an annotation file by number: the file stays on disk, only the table of its lines is in memory.

First station of the data path: `dataset.py` asks for record i and gets a dict. A remote file is copied to the cache
once, since records are read one by one and in random order.
"""

import json
import os

import numpy as np

from internvl.train.constants import BadSample
from internvl.train.files import is_remote, local_copy

CHUNK = 1 << 24


class Jsonl:
    """A file with one JSON object per line, read by byte offset. Blank lines hold no record.

    Costs 24 bytes of memory per record. Safe to share between forked workers and to pickle.

    Attributes:
        path: the file as named by the user.
        file: the file that is read: the same, or the copy of a remote one.

    Raises:
        ValueError: when the file does not exist, cannot be fetched or is not named `*.jsonl`.
    """

    def __init__(self, path: str):
        if not path.endswith("jsonl"):
            raise ValueError(f"annotation {path} must be a .jsonl file: one JSON object per line.")
        if not is_remote(path) and not os.path.isfile(path):
            raise ValueError(f"annotation {path} does not exist (relative paths start at {os.getcwd()}).")
        self.path, self.file = path, local_copy(path)
        starts, ends = _line_table(self.file)
        lengths = ends - starts
        if len(single := np.flatnonzero(lengths == 1)):  # a lone \r is the rest of a blank line
            lengths[single] -= np.memmap(self.file, np.uint8, "r")[starts[single]] == ord("\r")
        records = np.flatnonzero(lengths)
        self._starts, self._ends = starts[records], ends[records]
        self._lines = records + 1
        self._open_file = None

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict:
        """Record number `index`; BadSample when its line is not a JSON object."""
        try:
            record = json.loads(self.content(index))
        except ValueError as error:  # wrong JSON as well as wrong UTF-8
            raise BadSample(f"line {self.line(index)} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise BadSample(f"line {self.line(index)} is a JSON {type(record).__name__}, not an object")
        return record

    def content(self, index: int) -> bytes:
        """The line of record `index`."""
        if self._open_file is None:
            self._open_file = open(self.file, "rb", buffering=0)  # noqa: SIM115 (stays open)
        # pread, not seek and read: forked workers share one file position.
        start, end = int(self._starts[index]), int(self._ends[index])
        return os.pread(self._open_file.fileno(), end - start, start)

    def line(self, index: int) -> int:
        """Number of the line that holds record `index`, counted from 1."""
        return int(self._lines[index])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open_file": None}


def _line_table(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Byte offsets of the first byte of every line and of the byte behind its last."""
    newlines, size = [], 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size)
            size += len(chunk)
    ends = np.concatenate([*newlines, [size]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    return starts, ends
