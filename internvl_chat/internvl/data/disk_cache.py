"""Cache files with checksums: made once, verified whenever they are opened.

The name of a cache file is STEM-CHECKSUM.SUFFIX. So content and checksum appear in one rename, even if the run is
killed. A file that was damaged, cut or exchanged does not fit its name: it is deleted and made again.
"""

import errno
import fcntl
import logging
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape, glob
from pathlib import Path
from typing import BinaryIO

from internvl.regular_files import open_regular_file

logger = logging.getLogger(__name__)
CHUNK_BYTES = 1 << 20  # read at a time


def get_cache_dir() -> Path:
    """Return the cache directory: $INTERNVL_CACHE, else ~/.cache/internvl_chat.

    Everything in it can be recomputed.

    Raises:
        ValueError: neither INTERNVL_CACHE nor HOME is set.
    """
    if cache_dir := os.environ.get("INTERNVL_CACHE"):
        return Path(cache_dir)
    try:
        return Path.home() / ".cache" / "internvl_chat"
    except RuntimeError as error:  # HOME is not set, and the user is not in /etc/passwd
        raise ValueError(
            "there is no home directory for the cache: set INTERNVL_CACHE to a writable folder."
        ) from error


def get_file_version(path: str) -> list:
    """Return what changes whenever a file is written.

    A program can set the modification time, so that it stays; it cannot set the time of the last change.
    """
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def make_cache_file(stem: str, suffix: str, write_fn: Callable[[BinaryIO], object]) -> str:
    """Return a cache file, writing it if it is missing or damaged.

    Of several processes of a machine one writes it, and the others wait.

    Args:
        stem: path and name without checksum and suffix. It determines the content.

    Raises:
        ValueError: the cache is not writable.
    """
    path = find_cache_file(stem, suffix)
    if path is None:
        with _lock(stem):
            path = find_cache_file(stem, suffix) or write_cache_file(stem, suffix, write_fn)
    return path


def find_cache_file(stem: str, suffix: str) -> str | None:
    """Return a cache file, or None if it is missing or damaged.

    A damaged one is deleted, with a warning.
    """
    for path in _list_cache_files(stem, suffix):
        with suppress(OSError):  # another run has replaced it, or the file system fails
            if path == _name_cache_file(stem, suffix, path):
                return path
            logger.warning("Damaged cache file: %s (checksum mismatch). It is deleted and made again.", path)
            os.unlink(path)
    return None


def write_cache_file(stem: str, suffix: str, write_fn: Callable[[BinaryIO], object]) -> str:
    """Write a cache file atomically; return its path.

    It is written to a temporary folder and renamed. A previous file of this stem is deleted.

    Raises:
        ValueError: the cache is not writable.
    """
    try:
        os.makedirs(os.path.dirname(stem), exist_ok=True)
        temporary_dir = tempfile.TemporaryDirectory(dir=os.path.dirname(stem))
    except OSError as error:
        raise _make_unwritable_error(stem, suffix, error) from error
    with temporary_dir as folder:
        try:
            with open(os.path.join(folder, "content"), "wb") as file:
                write_fn(file)
            path = _name_cache_file(stem, suffix, file.name)
            os.replace(file.name, path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise  # from reading what is to be written
            raise _make_unwritable_error(stem, suffix, error) from error
    for other in _list_cache_files(stem, suffix):
        if other != path:
            with suppress(OSError):
                os.unlink(other)
    return path


def _make_unwritable_error(stem: str, suffix: str, error: OSError) -> ValueError:
    return ValueError(
        f"the cache {stem}{suffix} cannot be written ({error.strerror or error}); set INTERNVL_CACHE to a writable "
        "folder."
    )


def _list_cache_files(stem: str, suffix: str) -> list[str]:
    return sorted(glob(f"{escape(stem)}-{'[0-9a-f]' * 8}{escape(suffix)}"))


def _name_cache_file(stem: str, suffix: str, content_path: str) -> str:
    """Name a cache file by its stem and the checksum of its content."""
    # The stem is part of the checksum: a file of another stem that is renamed to this one does not fit.
    checksum = zlib.crc32(os.path.basename(stem).encode())
    with open_regular_file(content_path) as file:
        while chunk := file.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return f"{stem}-{checksum:08x}{suffix}"


@contextmanager
def _lock(stem: str) -> Iterator[None]:
    """Exclude other processes of this machine while a cache file is made.

    Where locks are not supported, several processes make the same file; the last one stays.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            os.makedirs(os.path.dirname(stem), exist_ok=True)
            file = stack.enter_context(open(f"{stem}.lock", "wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
            stack.callback(Path(f"{stem}.lock").unlink, missing_ok=True)
        yield
