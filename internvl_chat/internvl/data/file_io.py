"""Opening paths: on this machine, or in whatever file system fsspec knows by a path's protocol.

Below everything that reads data. `s3://bucket/key` needs the package s3fs, `gs://bucket/key` gcsfs, and so on; keys and
endpoints come from where those packages look for them (environment, ~/.aws, ~/.config/fsspec). Nothing of a remote file
system is kept between calls, so that forked and spawned workers are safe. Local paths never touch fsspec.
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

HEADER_BYTES = 1 << 16  # bytes fetched at a time where a header is all that is wanted


class MissingPackage(ValueError):
    """A path that cannot be opened in this environment; unlike a BadSample it ends the run."""


def join_root(root: str, path: str) -> str:
    """Where a record's `path` lies: below `root`, unless it is absolute or has a protocol of its own."""
    return path if is_remote(path) else os.path.join(root, path)


def require_inside_root(root: str, path: str) -> str:
    """`path`, of `join_root`, if it lies below `root` with all links resolved, of which the root itself may be one.

    Below a remote root neither `..` nor fsspec's chains (`::`) lead on. A root of "" names no folder: it bounds nothing
    on this machine, and nothing remote lies below it.

    Raises:
        BadSample: it lies elsewhere; who wrote the records may be a stranger.
    """
    if is_remote(root):
        folder = root.rstrip("/") + "/"
        rest = path[len(folder) :]
        below = path.startswith(folder) and ".." not in rest.split("/") and "::" not in rest
    elif is_remote(path):
        below = False
    else:
        below = not root or os.path.realpath(path).startswith(os.path.join(os.path.realpath(root), ""))
    if not below:
        raise UnusableSample(
            f"{path} lies outside the root {root!r} of its data set, where records may not lead: correct the root, or "
            "say --allow_outside_root True if the records are your own"
        )
    return path


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def open_file(path: str | os.PathLike, header: bool = False) -> BinaryIO:
    """A file for reading. A remote one is fetched whole, in one request, or with `header` in small pieces as read."""
    if not is_remote(path):
        return open(path, "rb")
    if header:
        return _with_filesystem(path, lambda system, inner: system.open(inner, "rb", block_size=HEADER_BYTES))
    return io.BytesIO(_with_filesystem(path, lambda system, inner: system.cat_file(inner)))


def file_stamp(path: str) -> tuple[int, int]:
    """Size and time of a file, which tell that it has changed; zeros if it is remote or absent."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return 0, 0


def exists(path: str) -> bool:
    return (
        _with_filesystem(path, lambda system, inner: system.exists(inner)) if is_remote(path) else os.path.exists(path)
    )


def is_dir(path: str) -> bool:
    return _with_filesystem(path, lambda system, inner: system.isdir(inner)) if is_remote(path) else os.path.isdir(path)


def list_dir(path: str) -> list[str]:
    """Names in a folder, those that begin with a dot left out."""
    names = _with_filesystem(path, _names) if is_remote(path) else os.listdir(path)
    return [name for name in names if not name.startswith(".")]


def _names(system, inner: str) -> list[str]:
    entries = [entry.rstrip("/") for entry in system.ls(inner, detail=False)]
    # Object stores may list the folder itself, as an empty object.
    return [os.path.basename(entry) for entry in entries if entry != inner.rstrip("/")]


def fetch_local_copy(path: str) -> str:
    """Path of a file on this machine with the content of `path`: that file, or a copy in the cache, fetched once.

    Raises:
        ValueError: a remote file cannot be fetched.
    """
    if not is_remote(path):
        return path
    try:
        version = _with_filesystem(path, lambda system, inner: system.checksum(inner))
        name = hashlib.sha256(f"{path} {version}".encode()).hexdigest()[:24]
        copy = get_cache_dir() / f"copy-{name}{os.path.splitext(path)[1]}"
        if not copy.exists():
            write_atomically(
                str(copy), lambda file: _with_filesystem(path, lambda system, inner: system.get_file(inner, file.name))
            )
        return str(copy)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be fetched: {error}") from error


def _with_filesystem(url: str | os.PathLike, question: Callable):
    """The answer of `question(file system, path in it)`.

    In `CLUSTER:s3://bucket/key` the cluster, a name from a petrel configuration, is dropped: which store answers is
    said by the environment (AWS_ENDPOINT_URL).

    Raises:
        MissingPackage: fsspec, or the protocol's package, is missing.
        OSError: for whatever the file system raises, which may be anything: no key, no such bucket, no network.
    """
    try:
        from fsspec.core import url_to_fs

        system, inner = url_to_fs(re.sub(r"^[\w-]+:(?=s3://)", "", os.fspath(url)))
    except (ImportError, ValueError) as error:
        raise MissingPackage(f"{url} cannot be opened by fsspec: {error}") from error
    try:
        return question(system, inner)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


# -- cache -------------------------------------------------------------------------------------------------------------


def get_cache_dir() -> Path:
    """Where what can be made again is kept: $INTERNVL_CACHE, else ~/.cache/internvl_chat."""
    return Path(os.environ.get("INTERNVL_CACHE") or Path.home() / ".cache" / "internvl_chat")


def write_atomically(path: str, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file as a whole or not at all: other runs may read it, and this one may be stopped.

    Raises:
        ValueError: the folder cannot be written.
    """
    folder, name = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            with open(os.path.join(unfinished, name), "wb") as file:
                fill(file)
            os.replace(file.name, path)
    except OSError as error:
        raise ValueError(
            f"the cache {path} cannot be written ({error.strerror or error}); set INTERNVL_CACHE to a folder."
        ) from error
