"""Open regular files only; read JSON and safetensors headers of unknown origin.

Every folder that a user downloads or shares may hold a FIFO, which would wait for a writer, a device, which has no end,
or a pointer of Git LFS instead of the file.
"""

import errno
import json
import os
import shutil
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 2**26  # the largest tokenizer.json of a published model has 35 MB
# A file of Git LFS that was not downloaded: a text of about 130 bytes that begins with this line.
LFS_POINTER_START, MAX_LFS_POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024


class UnusableFileError(OSError):
    """A path exists, but it is not a regular file or the file is too large."""


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice."""


def open_regular_file(path: str | os.PathLike, max_bytes: int | None = None) -> BinaryIO:
    """Open a local regular file for reading; refuse anything else.

    A FIFO would wait for a writer, and a device could be read without end. They are refused at once, also behind a
    symbolic link. The check is of the open file, so the path cannot be exchanged in between.

    Raises:
        FileNotFoundError: it does not exist.
        UnusableFileError: it is a FIFO, device or socket, or it has more than `max_bytes`.
        OSError: it is a folder, or the disk fails.
        ValueError: the path contains a null character or a lone surrogate.
    """
    try:
        file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115  # the caller closes it
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise UnusableFileError(f"{path} is a socket or device, not a regular file") from error
        raise
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        kind = "FIFO" if stat.S_ISFIFO(status.st_mode) else "device"
        raise UnusableFileError(f"{path} is a {kind}, not a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        file.close()
        raise UnusableFileError(f"{path} has {status.st_size:,} bytes, more than {max_bytes:,}")
    os.set_blocking(file.fileno(), True)
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def require_regular_files(folder: Path) -> None:
    """Raise if an entry of a folder is neither a folder nor a file with content.

    For folders that a library reads: it would open a FIFO and wait, and it has no clear message for a pointer of Git
    LFS. Folders below are not visited. Symbolic links are followed, as the hub's cache consists of them.

    Raises:
        UnusableFileError: an entry is a FIFO, device or socket.
        ValueError: an entry is a pointer of Git LFS.
    """
    for path in sorted(folder.iterdir()):
        try:
            status = path.stat()
        except OSError:  # a dangling link: it counts as missing
            continue
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode) or status.st_size <= MAX_LFS_POINTER_BYTES:
            with open_regular_file(path) as file:
                refuse_lfs_pointer(path, file.read(len(LFS_POINTER_START)))


def copy_regular_file(source: Path, target: Path) -> None:
    """Copy the content of a file that is neither a device nor a FIFO."""
    with open_regular_file(source) as opened, open(target, "wb") as copy:
        shutil.copyfileobj(opened, copy)


def refuse_lfs_pointer(path: str | os.PathLike, start: bytes) -> None:
    """Raise a ValueError if a file begins like a pointer of Git LFS."""
    if start.startswith(LFS_POINTER_START):
        raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: download it, e.g. with `git lfs pull`.")


def read_json_object(file: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> dict:
    """Read a JSON object from a file, see `read_json`."""
    content = read_json(file, max_bytes)
    if not isinstance(content, dict):
        raise ValueError(f"{file} is invalid: expected a JSON object, got a JSON {type(content).__name__}.")
    return content


def read_json(file: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES, unique_keys: bool = False) -> Any:
    """Read a JSON file of unknown origin.

    Args:
        unique_keys: refuse an object that has a key twice. By default its last value counts.

    Raises:
        OSError: it is missing, not a regular file or larger than `max_bytes`.
        ValueError: it is not JSON in UTF-8, or too deeply nested.
    """
    with open_regular_file(file, max_bytes) as opened:
        content = opened.read()
    refuse_lfs_pointer(file, content)
    try:
        hook = require_unique_keys if unique_keys else None
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=hook)
    except DuplicateKeyError as error:
        raise ValueError(f"{file} is ambiguous: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{file} is invalid: its JSON is nested too deeply.") from error


def require_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object, as `object_pairs_hook`.

    By default the last of equal keys wins, silently.

    Raises:
        DuplicateKeyError: a key is used twice.
    """
    if len(unique := dict(pairs)) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise DuplicateKeyError(f"the key {key[:80]!r} is used twice")
    return unique


def read_safetensors_header(file: str | os.PathLike) -> tuple[dict[str, dict], int]:
    """Read the header of a safetensors file of unknown origin.

    Returns:
        Tensor name -> its `dtype`, `shape` and `data_offsets`, and the place of the data that the offsets refer to.

    Raises:
        OSError: the file is missing or not a regular file.
        ValueError: it is cut, damaged or a pointer of Git LFS.
    """
    from safetensors import SafetensorError, safe_open  # here: tools/doctor.py runs where no library is installed

    with open_regular_file(file) as opened:
        refuse_lfs_pointer(file, opened.read(len(LFS_POINTER_START)))
        try:
            with safe_open(file, "np"):  # checks sizes and offsets of the whole header
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file ({error}).") from error
        # 8 bytes with the length of the header, the header (JSON), the tensors
        opened.seek(0)
        header_size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(header_size))
    header.pop("__metadata__", None)
    return header, 8 + header_size
