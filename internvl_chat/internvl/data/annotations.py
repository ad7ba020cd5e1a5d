"""Annotation files as sequences of records: JSONL, Parquet and Arrow.

Loading a sample starts here: `open_annotations(path)[17]` is a dict. Records stay on disk and are read one by one in
random order. So a remote file is first copied to the cache, and a table is converted there to JSONL (`tables.py`).
"""

import hashlib
import json
import os
import re
import zlib
from functools import cached_property
from typing import BinaryIO

import numpy as np

from internvl.constants import UnusableSample
from internvl.data.disk_cache import get_cache_dir, get_file_version, make_cache_file
from internvl.data.file_io import fetch_local_copy, get_extension, is_remote
from internvl.data.tables import JSON_LINES_EXTENSIONS, TABLE_EXTENSIONS, convert_table, is_annotation_file
from internvl.regular_files import (
    DuplicateKeyError,
    UnusableFileError,
    open_regular_file,
    refuse_lfs_pointer,
    require_unique_keys,
)

SCAN_CHUNK_BYTES = 1 << 22  # read at a time while looking for line breaks
LARGE_FILE_BYTES = 1 << 26  # files of at least this size keep their line table on disk
MAX_RECORDS, MAX_RECORD_BYTES = 1 << 27, 1 << 25
MAX_NESTING = 64  # of lists and objects in a record; Python's own limit depends on the depth of the call
DECOMPRESSION_COMMANDS = {".gz": "gunzip", ".zst": "zstd -d", ".bz2": "bunzip2", ".xz": "unxz", ".zip": "unzip"}
DECOMPRESSION_COMMANDS |= {".lz4": "lz4 -d", ".tar": "tar -xf", ".tgz": "tar -xf"}
# Extension of a file in another format -> how to make JSON lines of it.
TABLE_OF_TEXT = "pandas converts it: to_json(..., orient='records', lines=True)"
CONVERSIONS = dict.fromkeys((".csv", ".tsv", ".xlsx"), TABLE_OF_TEXT) | {
    ".json": "internvl_chat/tools/json2jsonl.py converts a .json file with a list; rename one that has an object per "
    "line"
}
HEAD_BYTES = 64  # that tell what a file is
# Pattern of the first bytes of a file that is named like JSON lines -> what it is, and what to do.
FOREIGN_CONTENT = {
    rb"\x1f\x8b": "is compressed by gzip: unpack it first (gunzip)",
    rb"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it first (zstd -d)",
    rb"PK\x03\x04": "is a ZIP archive: unpack it first (unzip)",
    rb"PAR1": "is a Parquet file: rename it to .parquet",
    rb"ARROW1": "is an Arrow file: rename it to .arrow",
    rb"\xff\xfe|\xfe\xff|\0?{\0": "is in UTF-16, expected UTF-8: convert it (iconv -f UTF-16 -t UTF-8)",
    rb"\s*{\s*\n\s*\"": "has objects over several lines, expected one per line: convert it (jq -c .)",
    rb"(?i)\s*<(!doctype|html|\?xml)": "is an HTML or XML page: download the file again",
}
JSON_ARRAY_START = re.compile(rb"\s*\[\s*({|$)")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_DECODER = json.JSONDecoder(object_pairs_hook=require_unique_keys)  # `json.loads` would make one for each record
# A line that holds a record: first byte, byte after the last, number from 1, CRC-32 of its bytes.
LINE = np.dtype([("start", np.int64), ("end", np.int64), ("number", np.int64), ("checksum", np.uint32)])


def open_annotations(path: str) -> "AnnotationFile":
    """Open a JSONL file, a Parquet or Arrow file, or a folder of them.

    Raises:
        ValueError: the file does not exist, fetching it failed, or its format is not supported.
    """
    extension = get_extension(path)
    is_folder = not is_remote(path) and os.path.isdir(path)
    if extension in DECOMPRESSION_COMMANDS and not is_folder:
        raise ValueError(
            f"annotation file {path} is compressed, but its records are read in random order: unpack it first "
            f"({DECOMPRESSION_COMMANDS[extension]} {path})."
        )
    has_no_file = not extension and not is_remote(path) and not os.path.lexists(path)
    if not is_folder and not is_annotation_file(path) and not has_no_file:
        raise ValueError(
            f"annotation file {path} is not supported: it must be a .jsonl file (one JSON object per line), a "
            ".parquet or .arrow file, or a local folder saved by the datasets library. "
            f"{CONVERSIONS.get(extension, CONVERSIONS['.json'])}."
        )
    try:
        local_path = fetch_local_copy(path)
        if not is_folder:
            with open_regular_file(local_path) as file:
                head = file.read(HEAD_BYTES)
            refuse_lfs_pointer(path, head)
            if extension in JSON_LINES_EXTENSIONS:
                _refuse_foreign_content(path, head)
        if is_folder or extension in TABLE_EXTENSIONS:
            local_path = convert_table(local_path, path)
        return AnnotationFile(path, local_path)
    except FileNotFoundError as error:
        hint = "; patterns, ~ and variables are not supported" if re.search(r"[*?{$]|^~", path) else ""
        raise ValueError(
            f"annotation file {path} does not exist (relative paths start at {os.getcwd()}{hint})."
        ) from error
    except OSError as error:
        raise ValueError(f"annotation file {path} cannot be opened: {error.strerror or error}.") from error


def _refuse_foreign_content(path: str, head: bytes) -> None:
    """Raise ValueError if a file of JSON lines begins like one of another format."""
    for start, description in FOREIGN_CONTENT.items():
        if re.match(start, head):
            raise ValueError(f"annotation file {path} {description}.")


class AnnotationFile:
    """A file with one JSON object per line, read by byte offset.

    Blank lines are skipped. The line table of a large file is computed once and cached on disk. It is memory-mapped, so
    workers share one copy. The file must not change while it is in use: the checksum of each line is compared whenever
    it is read. Safe to share with forked dataloader workers and to pickle to spawned ones.

    Args:
        path: the file or folder as the user wrote it, for messages.
        local_path: the JSONL file that is read: `path`, the cached copy of a remote file, or a converted table.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
        ValueError: it is a JSON array.
    """

    def __init__(self, path: str, local_path: str):
        self.path, self.local_path = path, local_path
        self._table_path: str | None = None  # where a large file's line table is cached
        self._lines = self._load_lines()
        self._open_file: BinaryIO | None = None
        if len(self) and JSON_ARRAY_START.match(self._read_start_of_first_line()):
            raise ValueError(
                f"annotation file {path} is a JSON array, expected one JSON object per line: "
                "internvl_chat/tools/json2jsonl.py converts it."
            )

    def _load_lines(self) -> np.ndarray:
        """Scan the lines, or memory-map the cached table of a large file.

        Returns:
            (num_records,) of LINE.
        """
        if os.path.getsize(self.local_path) < LARGE_FILE_BYTES:
            return scan_lines(self.local_path)
        key = json.dumps([get_file_version(self.local_path), LINE.descr])
        self._table_path = make_cache_file(
            str(get_cache_dir() / f"lines-{hashlib.sha256(key.encode()).hexdigest()[:24]}"),
            ".npy",
            lambda file: np.save(file, scan_lines(self.local_path)),
        )
        return np.load(self._table_path, mmap_mode="r")

    def _read_start_of_first_line(self) -> bytes:
        start, end = self._lines[0]["start"], self._lines[0]["end"]
        with open_regular_file(self.local_path) as file:
            file.seek(start)
            return file.read(min(end - start, 64))

    @property
    def checksums(self) -> np.ndarray:
        """(num_records,) uint32: CRC-32 of the bytes of each record."""
        return self._lines["checksum"]

    @cached_property
    def content_id(self) -> str:
        """Hash of the content of all records, in their order."""
        content = hashlib.sha256(np.ascontiguousarray(self.checksums).tobytes())
        content.update((self._lines["end"] - self._lines["start"]).tobytes())
        return content.hexdigest()[:24]

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._lines)

    def __getitem__(self, index: int) -> dict:
        """Read and parse record `index`.

        Raises:
            UnusableSample: it is malformed, or has changed since the file was opened.
        """
        number, content = self.line_number(index), self.read_bytes(index)
        too_deep = f"line {number} is nested too deeply: more than {MAX_NESTING} levels"
        try:
            # Not bytes: `json` would accept UTF-16, and lone surrogates in UTF-8.
            record = JSON_DECODER.decode(content.decode())
        except UnicodeDecodeError as error:
            raise UnusableSample(f"line {number} is not JSON: it is not UTF-8 ({error.reason})") from error
        except DuplicateKeyError as error:
            raise UnusableSample(f"line {number} is ambiguous: {error}") from error
        except ValueError as error:
            raise UnusableSample(f"line {number} is not JSON: {error}") from error
        except RecursionError as error:
            raise UnusableSample(too_deep) from error
        if _is_nested_too_deeply(record):
            raise UnusableSample(too_deep)
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UnusableSample(f"line {number}: expected a JSON object, got {kind}")
        return record

    def read_bytes(self, index: int) -> bytes:
        """Read record `index` without parsing it; raises as `__getitem__` does."""
        start, end, number, checksum = self._lines[index].item()
        if end - start > MAX_RECORD_BYTES:
            raise UnusableSample(f"line {number} has {end - start:,} bytes, at most {MAX_RECORD_BYTES:,} are supported")
        if self._open_file is None:
            try:
                self._open_file = open_regular_file(self.local_path)
            except (FileNotFoundError, UnusableFileError) as error:
                raise UnusableSample(f"its annotation file {self.local_path} was removed during the run") from error
        # pread, not seek and read: forked workers share one file position.
        try:
            content = os.pread(self._open_file.fileno(), end - start, start)
        except OSError:
            self._open_file = None  # a stale handle of NFS does not become valid again
            raise
        if zlib.crc32(content) != checksum:
            raise UnusableSample(
                f"line {number} is not what it was when the run opened {self.local_path} (checksum mismatch): the file "
                "has been changed during the run"
            )
        return content

    def line_number(self, index: int) -> int:
        """Return the line or table row of record `index`, from 1."""
        return int(self._lines[index]["number"])

    def __getstate__(self) -> dict:
        # A memory-mapped table is not copied: the process that unpickles this opens it again.
        return self.__dict__ | {"_open_file": None} | ({"_lines": None} if self._table_path else {})

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        if self._table_path:
            self._lines = np.load(self._table_path, mmap_mode="r")


def scan_lines(path: str) -> np.ndarray:
    """Find the lines of a JSONL file that hold a record.

    Memory grows with the number of records, not with the size of the file. A UTF-8 byte order mark is skipped.

    Returns:
        (num_records,) of LINE.
    """
    parts = []
    with open_regular_file(path) as file:
        has_mark = file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
        offset = file.seek(len(BYTE_ORDER_MARK) if has_mark else 0)  # of the chunk
        # The line that the chunk begins in: its first byte, the number of lines before it, its checksum so far.
        line_start, num_before, checksum = offset, 0, 0
        num_records = 0
        is_at_end = False
        while not is_at_end:
            chunk = file.read(SCAN_CHUNK_BYTES)
            is_at_end = not chunk
            chunk = memoryview(chunk or b"\n")  # the last line may have no line break
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))  # (L,) of the lines that end here
            starts = np.append(
                line_start - offset, ends + 1
            )  # (L + 1,) the last of these lines continues in the next chunk
            kept = np.flatnonzero(ends > starts[:-1])
            lines = np.empty(len(kept), LINE)
            lines["start"], lines["end"], lines["number"] = (
                starts[kept] + offset,
                ends[kept] + offset,
                kept + 1 + num_before,
            )
            spans = zip(starts[kept].clip(0), ends[kept], strict=True)
            lines["checksum"] = [zlib.crc32(chunk[start:end]) for start, end in spans]
            if len(kept) and kept[0] == 0:
                lines["checksum"][0] = zlib.crc32(chunk[: ends[0]], checksum)
            parts.append(lines)
            if (num_records := num_records + len(lines)) > MAX_RECORDS:
                raise ValueError(f"annotation file {path} has more than {MAX_RECORDS:,} records: split it.")
            checksum = zlib.crc32(chunk[max(0, starts[-1]) :], 0 if len(ends) else checksum)
            line_start, num_before, offset = starts[-1] + offset, num_before + len(ends), offset + len(chunk)
    lines = np.concatenate(parts)
    # A lone \r is a blank line of a file with \r\n.
    is_blank = (lines["end"] - lines["start"] == 1) & (lines["checksum"] == zlib.crc32(b"\r"))
    return lines[~is_blank]


def _is_nested_too_deeply(value: object) -> bool:
    """Return whether lists and objects are nested in more than MAX_NESTING levels."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(MAX_NESTING):
        below = []
        for parent in level:
            for child in parent.values() if isinstance(parent, dict) else parent:
                if isinstance(child, list | dict):
                    below.append(child)
        if not below:
            return False
        level = below
    return True
