"""Checksums of checkpoint files, and the latest valid checkpoint.

A manifest is written last and verified before a checkpoint is read. Its checksums are CRC-32 of blocks, so all cores
and all ranks share the work on one large file. They detect damage by disks and interrupted writes, at the speed of
reading. They do not protect against forgery.

    {"block": bytes, "files": {"mlp1/adapter_model.safetensors": {"size": bytes, "crc32": [one per block]}, ...}}
"""

import errno
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from internvl.checkpoint.trainer_state import TRAINER_STATE_FILE, parse_checkpoint_step, read_trainer_state
from internvl.dist_utils import count_cores_per_rank, gather_objects, get_rank, get_world_size, run_on_rank_0
from internvl.model.model_card import CARD_FILE
from internvl.regular_files import read_json, read_json_object, read_safetensors_header

MANIFEST_FILE = "manifest.json"
BLOCK_BYTES = 2**26
UNIVERSAL_DIR = "universal"  # output of DeepSpeed's converter in a checkpoint, removed after reading
RANK_IN_NAME = re.compile(r"rank_(\d+)_mp_rank|rng_state_(\d+)")  # files that DeepSpeed and transformers write per rank
NUM_LISTED = 3  # errors in a message
UNSUPPORTED_ERRNOS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR}

# -- writing -----------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, is_writer: bool, one_dir_per_node: bool = False, block: int = BLOCK_BYTES) -> None:
    """Write the manifest and flush the checkpoint to the disk. A collective.

    Args:
        folder: the checkpoint. Every rank reads the files it wrote, which are in its node's page cache.
        is_writer: whether this rank writes a manifest.
        one_dir_per_node: each node has a separate output folder, in which the writing rank reads all files.
        block: bytes per checksum.
    """
    unlisted = [folder / MANIFEST_FILE, folder / CARD_FILE]  # users edit the model card
    files = [file for file in folder.rglob("*") if file.is_file() and file not in unlisted]
    is_own = [is_writer if one_dir_per_node else _get_writing_rank(file.name) == get_rank() for file in files]
    own_files = [file for file, own in zip(files, is_own, strict=True) if own]
    own_entries = _map_in_threads(lambda file: (str(file.relative_to(folder)), _make_entry(file, block)), own_files)
    entries_by_rank = gather_objects(own_entries)
    if is_writer:
        entries = own_entries if one_dir_per_node else list(chain(*entries_by_rank))
        manifest = folder / MANIFEST_FILE
        manifest.write_text(json.dumps({"block": block, "files": dict(sorted(entries))}, indent=1))
        fsync_paths(manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder)


def fsync_paths(*paths: Path) -> None:
    """Flush files, or the entries of folders, to the disk.

    Some file systems (CIFS, 9p, FUSE) cannot flush a folder. That is no error: they write its entries at once, or not
    in an order that a program could demand.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in UNSUPPORTED_ERRNOS or not path.is_dir():
                raise
        finally:
            os.close(descriptor)


def _get_writing_rank(name: str) -> int:
    """Return the rank in a file's name; 0 without one."""
    match = RANK_IN_NAME.search(name)
    return int(match[1] or match[2]) % get_world_size() if match else 0


def _make_entry(file: Path, block: int) -> dict:
    """Flush a file and make its entry of the manifest."""
    fsync_paths(file)
    size = file.stat().st_size
    indices = range(_count_blocks(size, block))
    return {"size": size, "crc32": _map_in_threads(lambda index: _checksum(file, index, block), indices)}


# -- verifying ---------------------------------------------------------------------------------------------------------


def find_checkpoint_errors(checkpoint: Path) -> list[str]:
    """List the errors of a checkpoint, one sentence per file.

    A collective with the same result on every rank; each rank verifies every n-th block. A checkpoint of an earlier
    version has no manifest. Then only its JSON and safetensors files are checked, for truncation.

    Everything in the folder is untrusted. Only regular files that a listing of the folder has found are opened,
    whatever names the manifest holds.
    """
    names, errors = list_files(checkpoint)
    if TRAINER_STATE_FILE not in names:
        errors.append(f"{TRAINER_STATE_FILE} is missing")
    elif MANIFEST_FILE in names:
        errors += _verify_manifest(checkpoint, names)
    else:
        errors += filter(None, (_verify_format(checkpoint, name) for name in names[get_rank() :: get_world_size()]))
    if not errors:
        try:
            read_trainer_state(checkpoint)
        except (ValueError, OSError) as error:
            errors.append(str(error).replace(f"{checkpoint}/", "").removesuffix("."))
    return sorted(set(chain(*gather_objects(errors))))


def list_files(folder: Path) -> tuple[list[str], list[str]]:
    """List the regular files below a folder, and the errors of other entries.

    Returns:
        Paths relative to the folder, and a sentence for each link, FIFO, device and socket. A run writes none of these.
    """
    names, errors, pending = [], [], [""]
    while pending:
        parent = pending.pop()
        try:
            entries = sorted(os.scandir(folder / parent), key=lambda entry: entry.name)
        except OSError as error:
            errors.append(f"{_quote(parent) if parent else folder} cannot be read: {error.strerror}")
            continue
        for entry in entries:
            name = parent + entry.name
            if entry.is_dir(follow_symlinks=False):
                pending.append(f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                names.append(name)
            else:
                kind = "is a symbolic link" if entry.is_symlink() else "is not a regular file"
                errors.append(f"{_quote(name)} {kind}")
    return names, errors


def _verify_manifest(checkpoint: Path, names: list[str]) -> list[str]:
    """List missing, unlisted and changed files; of the blocks, verify this rank's share."""
    try:
        manifest = read_json_object(checkpoint / MANIFEST_FILE)
    except (ValueError, OSError):
        return [f"{MANIFEST_FILE} is damaged"]
    block, entries = manifest.get("block"), manifest.get("files")
    if type(block) is not int or block < 1 or not isinstance(entries, dict):
        return [f"{MANIFEST_FILE} is damaged: expected block, an integer >= 1, and files, an object"]
    existing = set(names)
    errors = [f"{_quote(name)} is missing" for name in entries if name not in existing]
    errors += [f"{name} is not in {MANIFEST_FILE}" for name in names if _is_read(name) and name not in entries]
    blocks = []
    for name, entry in entries.items():
        if not _is_valid_entry(entry, block):
            errors.append(f"{MANIFEST_FILE} is damaged: the entry of {_quote(name)} is {entry!r:.80}")
        elif name in existing:
            blocks += [(name, entry, index) for index in range(len(entry["crc32"]))]

    def verify(name: str, entry: dict, index: int) -> str | None:
        try:
            if (size := (checkpoint / name).stat().st_size) != entry["size"]:
                return f"{name} has {size:,} bytes, expected {entry['size']:,}"
            is_equal = _checksum(checkpoint / name, index, block) == entry["crc32"][index]
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        return None if is_equal else f"{name}: checksum mismatch"

    return errors + list(
        filter(None, _map_in_threads(lambda args: verify(*args), blocks[get_rank() :: get_world_size()]))
    )


def _is_valid_entry(entry: Any, block: int) -> bool:
    size, checksums = (entry.get("size"), entry.get("crc32")) if isinstance(entry, dict) else (None, None)
    is_count = type(size) is int and 0 <= size < 2**63
    return is_count and isinstance(checksums, list) and len(checksums) == _count_blocks(size, block)


def _is_read(name: str) -> bool:
    """Check whether resuming could read a file of this name.

    Other files may be added to a checkpoint: notes, or weights that DeepSpeed's `zero_to_fp32` has converted.
    """
    is_added = name == MANIFEST_FILE or ".bin" in name or name.startswith(f"{UNIVERSAL_DIR}/")
    return not is_added and name.endswith((".json", ".safetensors", ".pt", ".pth"))


def _verify_format(checkpoint: Path, name: str) -> str | None:
    readers = {".json": read_json, ".safetensors": read_safetensors_header}
    try:
        if read_fn := readers.get(Path(name).suffix):
            read_fn(checkpoint / name)
    except (ValueError, OSError):
        return f"{_quote(name)} is damaged"
    return None


def _quote(name: str) -> str:
    """Shorten a foreign name to one printable line."""
    return name if name.isprintable() and len(name) < 120 else f"{ascii(name):.120}"


# -- choosing ----------------------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """List checkpoint folders, newest first by the step in their names."""
    steps = [(step, path) for path in folder.glob("checkpoint-*") if (step := parse_checkpoint_step(path)) is not None]
    return [path for _, path in sorted(steps, reverse=True) if path.is_dir()]


def find_latest_valid_checkpoint(folder: Path, log_fn: Callable[[Path, list[str]], Any]) -> Path | None:
    """Find the newest checkpoint without an error. A collective.

    Args:
        log_fn: called with each newer, invalid checkpoint and its errors.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        ValueError: there are checkpoints, and none is valid.
    """
    candidates = run_on_rank_0(lambda: list_checkpoints(folder))
    checkpoint, errors = folder, []
    for checkpoint in candidates:
        errors = find_checkpoint_errors(checkpoint)
        if not errors:
            return checkpoint
        log_fn(checkpoint, errors)
    if candidates:
        raise ValueError(
            f"None of the {len(candidates)} checkpoints in {folder} is valid ({checkpoint.name}: "
            f"{summarize_errors(errors)}): --overwrite_output_dir True starts from the beginning."
        )
    return None


def summarize_errors(errors: list[str]) -> str:
    """Join the first few errors."""
    more = f"; and {len(errors) - NUM_LISTED} more" if len(errors) > NUM_LISTED else ""
    return "; ".join(errors[:NUM_LISTED]) + more


# -- blocks ------------------------------------------------------------------------------------------------------------


def _count_blocks(size: int, block: int) -> int:
    return max(1, -(-size // block))


def _checksum(file: Path, index: int, block: int) -> str:
    with open(file, "rb", buffering=0) as opened:
        opened.seek(index * block)
        value, num_left = 0, block
        while num_left and (data := opened.read(min(num_left, 2**22))):
            value, num_left = zlib.crc32(data, value), num_left - len(data)
    return f"{value:08x}"


def _map_in_threads(work_fn: Callable, items: Iterable) -> list:
    """Map in threads: reading files and computing checksums release the GIL."""
    items = list(items)
    if len(items) < 2 or count_cores_per_rank() < 2:
        return [work_fn(item) for item in items]
    with ThreadPoolExecutor(min(8, count_cores_per_rank(), len(items))) as pool:
        return list(pool.map(work_fn, items))
