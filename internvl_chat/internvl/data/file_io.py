"""Read files by local path or URL; locate the cache directory.

URLs are opened by fsspec: `s3://bucket/key` requires the package s3fs, `gs://bucket/key` gcsfs, and so on. These
packages look for keys and endpoints in the environment, ~/.aws and ~/.config/fsspec. No remote file system object is
kept between calls, so forked and spawned workers are safe. Local paths never reach fsspec.
"""

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from internvl.constants import UnusableSample

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


def open_file(path: str | os.PathLike, header_only: bool = False) -> BinaryIO:
    """Open a local or remote file for reading.

    Args:
        header_only: fetch a remote file in small blocks as it is read, instead of all of it in one request.
    """
    if not is_remote(path):
        return open(path, "rb")
    if header_only:
        return _call_filesystem(path, lambda system, key: system.open(key, "rb", block_size=HEADER_BLOCK_BYTES))
    return io.BytesIO(_call_filesystem(path, lambda system, key: system.cat_file(key)))


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
    return _call_filesystem(path, lambda system, key: system.exists(key)) if is_remote(path) else os.path.exists(path)


def is_dir(path: str) -> bool:
    """Return whether a local or remote path is a folder."""
    return _call_filesystem(path, lambda system, key: system.isdir(key)) if is_remote(path) else os.path.isdir(path)


def list_dir(path: str) -> list[str]:
    """List the names in a local or remote folder, without hidden files."""
    names = _call_filesystem(path, _list_remote_dir) if is_remote(path) else os.listdir(path)
    return [name for name in names if not name.startswith(".")]


def _list_remote_dir(system, key: str) -> list[str]:
    entries = [entry.rstrip("/") for entry in system.ls(key, detail=False)]
    # Object stores may list the folder itself, as an empty object.
    return [os.path.basename(entry) for entry in entries if entry != key.rstrip("/")]


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
        copy = get_cache_dir() / f"copy-{name}{os.path.splitext(path)[1]}"
        if not copy.exists():
            write_atomically(
                str(copy), lambda file: _call_filesystem(path, lambda system, key: system.get_file(key, file.name))
            )
        return str(copy)
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
        OSError: any error of the file system, such as a missing bucket or no network.
    """
    try:
        from fsspec.core import url_to_fs

        system, key = url_to_fs(re.sub(r"^[\w-]+:(?=s3://)", "", os.fspath(url)))
    except (ImportError, ValueError) as error:
        raise MissingPackageError(f"{url} cannot be opened by fsspec: {error}") from error
    try:
        return call_fn(system, key)
    except OSError:
        raise
    except Exception as error:  # packages for object stores raise other types, too
        raise OSError(f"{type(error).__name__}: {error}") from error


# -- cache -------------------------------------------------------------------------------------------------------------


def get_cache_dir() -> Path:
    """Return the cache directory: $INTERNVL_CACHE, else ~/.cache/internvl_chat.

    Everything in it can be recomputed.
    """
    return Path(os.environ.get("INTERNVL_CACHE") or Path.home() / ".cache" / "internvl_chat")


def write_atomically(path: str, write_fn: Callable[[BinaryIO], object]) -> None:
    """Write a file that other processes see complete or not at all.

    It is written to a temporary folder next to `path` and then renamed. Other runs may read it at any time, and this
    run may be killed.

    Raises:
        ValueError: the folder is not writable.
    """
    folder, name = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary_dir:
            with open(os.path.join(temporary_dir, name), "wb") as file:
                write_fn(file)
            os.replace(file.name, path)
    except OSError as error:
        raise ValueError(
            f"the cache {path} cannot be written ({error.strerror or error}); set INTERNVL_CACHE to a writable folder."
        ) from error
