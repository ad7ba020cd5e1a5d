"""Read files by local path or URL.

URLs are opened by fsspec: `s3://bucket/key` requires the package s3fs, `gs://bucket/key` gcsfs, and so on. These
packages look for keys and endpoints in the environment, ~/.aws and ~/.config/fsspec. No remote file system object is
kept between calls, so forked and spawned workers are safe. Local paths never reach fsspec.
"""

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, BinaryIO

from internvl.constants import UnusableSample
from internvl.data.disk_cache import get_cache_dir, make_cache_file
from internvl.data.outages import StoreUnavailableError, is_outage
from internvl.regular_files import UnusableFileError as UnusableFileError  # also for other modules of data/
from internvl.regular_files import open_regular_file

# Answers of a store about an object itself: it does not exist, or cannot exist under such a name.
OBJECT_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)
OBJECT_ERRNOS = (errno.EINVAL, errno.ENAMETOOLONG)
HEADER_BLOCK_BYTES = 1 << 16  # fetched at a time from a remote file of which only the header is read


class MissingPackageError(ValueError):
    """A package that is required to open a path is missing.

    Unlike UnusableSample it ends the run, because every sample of this kind would fail.
    """


def join_root(root: str, path: str) -> str:
    """Join a record's path to its root.

    An absolute path or URL is returned as it is.
    """
    return path if is_remote(path) else os.path.join(root, path)


def require_inside_root(root: str, path: str) -> str:
    """Return a joined path, or raise if it lies outside the root.

    Records may be untrusted. Symbolic links are resolved first; the root itself may be one. Below a remote root,
    neither `..` nor chained URLs of fsspec (`::`) are allowed. An empty root allows every local path and no URL.

    Raises:
        UnusableSample: the path lies outside.
    """
    if is_remote(root):
        prefix = root.rstrip("/") + "/"
        below_prefix = path[len(prefix) :]
        is_inside = path.startswith(prefix) and ".." not in below_prefix.split("/") and "::" not in below_prefix
    elif is_remote(path):
        is_inside = False
    else:
        is_inside = not root or os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), ""))
    if not is_inside:
        raise UnusableSample(
            f"{path} lies outside the root {root!r} of its dataset, which is not allowed: correct the root, or pass "
            "--allow_outside_root True if you trust the records"
        )
    return path


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether a path is a URL, to be opened by fsspec."""
    return "://" in os.fspath(path)


def get_extension(path: str) -> str:
    """Return the extension of a path or URL, in lower case."""
    return os.path.splitext(path.partition("?")[0] if is_remote(path) else path)[1].lower()


def open_file(path: str | os.PathLike, header_only: bool = False, max_bytes: int | None = None) -> BinaryIO:
    """Open a local regular file or a remote file for reading.

    Args:
        header_only: fetch a remote file in small blocks as it is read, instead of all of it in one request.
        max_bytes: no more are fetched.

    Raises:
        FileNotFoundError, UnusableFileError, OSError, ValueError: see `open_regular_file`.
        MissingPackageError: see `_call_filesystem`.
    """
    if not is_remote(path):
        return open_regular_file(path, max_bytes)
    if header_only:
        opened = _call_filesystem(path, lambda system, key: system.open(key, "rb", block_size=HEADER_BLOCK_BYTES))
        num_bytes = opened.size or 0  # unknown for some HTTP servers
        file: Any = _RemoteFile(str(path), opened)
    else:
        # One byte more reveals a larger file without another request.
        end = None if max_bytes is None else max_bytes + 1
        content = _call_filesystem(path, lambda system, key: system.cat_file(key, end=end))
        file, num_bytes = io.BytesIO(content), len(content)
    if max_bytes is not None and num_bytes > max_bytes:
        raise UnusableFileError(f"{path} has more than {max_bytes:,} bytes")
    return file


def get_size_and_mtime(path: str) -> tuple[int, int]:
    """Return bytes and modification time (ns) of a local file.

    Both are 0 for a remote or missing file.
    """
    with suppress(OSError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return 0, 0


def exists(path: str) -> bool:
    """Return whether a local or remote path exists."""
    if is_remote(path):
        # Not `exists`: for HTTP it takes an outage for a missing file.
        with suppress(FileNotFoundError):
            return bool(_call_filesystem(path, lambda system, key: system.info(key)))
        return False
    return _read_mode(path) is not None


def is_dir(path: str) -> bool:
    """Return whether a local or remote path is a folder."""
    if is_remote(path):
        return _call_filesystem(path, lambda system, key: system.isdir(key))
    return stat.S_ISDIR(_read_mode(path) or 0)


def _read_mode(path: str) -> int | None:
    """Return the file mode of a local path; None if it does not exist.

    Unlike `os.path.exists` it does not take an outage for a missing file.
    """
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character
        if is_outage(error):
            raise
        return None


def list_files(path: str, suffixes: Collection[str]) -> list[str]:
    """List the files of a folder with these suffixes, without hidden ones.

    Raises:
        UnusableFileError: such an entry of a local folder is a FIFO, device, socket or dangling link.
    """
    entries = _call_filesystem(path, _list_remote_files) if is_remote(path) else _list_local_files(path)
    is_regular = {
        name: regular
        for name, regular in entries.items()
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes
    }
    for name in is_regular:
        if not is_regular[name]:
            raise UnusableFileError(f"{os.path.join(path, name)} is not a regular file")
    return list(is_regular)


def _list_local_files(path: str) -> dict[str, bool]:
    """Return the entries of a folder that are no folders, and whether they are regular files."""
    with os.scandir(path) as entries:
        return {entry.name: entry.is_file() for entry in entries if not entry.is_dir()}


def _list_remote_files(system, key: str) -> dict[str, bool]:
    entries = system.ls(key, detail=True)
    return {os.path.basename(entry["name"]): True for entry in entries if entry["type"] != "directory"}


def fetch_local_copy(path: str) -> str:
    """Return a local path to a file, fetching a remote one once.

    The name of the cached copy changes whenever the remote file does.

    Raises:
        ValueError: a remote file does not exist, or fetching it failed.
    """
    if not is_remote(path):
        return path
    try:
        version = _call_filesystem(path, lambda system, key: system.checksum(key))
        name = hashlib.sha256(f"{path} {version}".encode()).hexdigest()[:24]
        return make_cache_file(
            str(get_cache_dir() / f"copy-{name}"),
            get_extension(path),
            lambda file: _call_filesystem(path, lambda system, key: system.get_file(key, file.name)),
        )
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be fetched: {error}") from error


def _call_filesystem(url: str | os.PathLike, call_fn: Callable):
    """Return `call_fn(file system, key)` for the fsspec file system of a URL.

    The cluster in `CLUSTER:s3://bucket/key`, a name from a petrel configuration file, is ignored. The environment
    variable AWS_ENDPOINT_URL selects the store.

    Raises:
        MissingPackageError: fsspec or the protocol's package is missing, or the protocol is unknown.
        FileNotFoundError, OSError: the store's answer about the object itself.
        StoreUnavailableError: anything else, such as no network, no access or an overloaded server.
    """
    try:
        from fsspec.core import url_to_fs

        system, key = url_to_fs(re.sub(r"^[\w-]+:(?=s3://)", "", os.fspath(url)))
    except (ImportError, ValueError) as error:
        raise MissingPackageError(f"{url} cannot be opened by fsspec: {error}") from error
    return _call_store(url, lambda: call_fn(system, key))


def _call_store(url: str | os.PathLike, call_fn: Callable):
    """Return `call_fn()`; tell an outage from an answer about the object."""
    try:
        return call_fn()
    except OBJECT_ERRORS as error:
        if _is_answer(error.__cause__):
            raise
        raise StoreUnavailableError(f"{url} ({type(error.__cause__).__name__}: {error.__cause__})") from error
    except Exception as error:  # packages for object stores raise many types
        if isinstance(error, OSError) and error.errno in OBJECT_ERRNOS:
            raise
        raise StoreUnavailableError(f"{url} ({type(error).__name__}: {error})") from error


def _is_answer(cause: BaseException | None) -> bool:
    """Return whether an error about an object, with this cause, is a store's answer.

    fsspec 2026.9 makes a FileNotFoundError of whatever happens while it asks an HTTP server about a file.
    """
    is_disconnected = isinstance(cause, OSError) and not isinstance(cause, OBJECT_ERRORS)
    return not is_disconnected and getattr(cause, "status", 404) == 404


class _RemoteFile:
    """A remote file that is fetched as it is read."""

    def __init__(self, url: str, file):
        self._url, self._file = url, file

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        return _call_store(self._url, lambda: self._file.read(size))
