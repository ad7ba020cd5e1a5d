"""Checksums of checkpoint files, and the latest valid checkpoint.

A manifest is written last and verified before a checkpoint is read. Its checksums are CRC-32 of blocks, so all cores
and all ranks share the work on one large file. They detect damage by disks and interrupted writes, at the speed of
reading. They do not protect against forgery.

    {"block": bytes, "files": {"mlp1/adapter_model.safetensors": {"size": bytes, "crc32": [one per block]}, ...}}
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from internvl.dist_utils import count_cores_per_rank, gather_objects, get_rank, get_world_size, run_on_rank_0

MANIFEST_FILE = "manifest.json"
BLOCK_BYTES = 2**26
TRAINER_STATE_FILE = "trainer_state.json"  # transformers' name; every checkpoint has one
RANK_IN_NAME = re.compile(r"rank_(\d+)_mp_rank|rng_state_(\d+)")  # files that DeepSpeed and transformers write per rank
MAX_HEADER_BYTES = 10**8  # of a safetensors file, as the library allows
NUM_LISTED = 3  # errors in a message

# -- writing -----------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, is_writer: bool, one_dir_per_node: bool = False, block: int = BLOCK_BYTES) -> None:
    """Write the manifest and flush the checkpoint to the disk. A collective.

    Args:
        folder: the checkpoint. Every rank reads the files it wrote, which are in its node's page cache.
        is_writer: whether this rank writes a manifest.
        one_dir_per_node: each node has a separate output folder, in which the writing rank reads all files.
        block: bytes per checksum.
    """
    files = [file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST_FILE]
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
    """Flush files, or the entries of folders, to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
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
    num_blocks = max(1, -(-size // block))
    return {"size": size, "crc32": _map_in_threads(lambda index: _checksum(file, index, block), range(num_blocks))}


# -- verifying ---------------------------------------------------------------------------------------------------------


def find_checkpoint_errors(checkpoint: Path) -> list[str]:
    """List the errors of a checkpoint, one sentence per file.

    A collective with the same result on every rank; each rank verifies every n-th block. A checkpoint of an earlier
    version has no manifest. Then only its JSON and safetensors files are checked, for truncation.
    """
    if not (checkpoint / TRAINER_STATE_FILE).is_file():
        errors = [f"{TRAINER_STATE_FILE} is missing"]
    elif (checkpoint / MANIFEST_FILE).is_file():
        errors = _verify_manifest(checkpoint)
    else:
        errors = [error for file in checkpoint.rglob("*") if (error := _verify_format(checkpoint, file))]
    return sorted(set(chain(*gather_objects(errors))))


def _verify_manifest(checkpoint: Path) -> list[str]:
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
        files, block = manifest["files"], int(manifest["block"])
        blocks = [(name, entry, index) for name, entry in files.items() for index in range(len(entry["crc32"]))]
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST_FILE} is damaged"]

    def verify(name: str, entry: dict, index: int) -> str | None:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != entry["size"]:
            return f"{name} has {size:,} bytes, expected {entry['size']:,}"
        try:
            is_equal = _checksum(file, index, block) == entry["crc32"][index]
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None if is_equal else f"{name}: checksum mismatch"

    return list(filter(None, _map_in_threads(lambda args: verify(*args), blocks[get_rank() :: get_world_size()])))


def _verify_format(checkpoint: Path, file: Path) -> str | None:
    name = file.relative_to(checkpoint)
    try:
        if file.suffix == ".json":
            json.loads(file.read_text())
        if file.suffix == ".safetensors":
            with open(file, "rb") as opened:
                header_size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(min(header_size, MAX_HEADER_BYTES)))
            header.pop("__metadata__", None)
            expected = 8 + header_size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if file.stat().st_size != expected:
                return f"{name} has {file.stat().st_size:,} bytes, expected {expected:,}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{name} is damaged"
    return None


# -- choosing ----------------------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """List checkpoint folders, newest first by the step in their names."""
    steps = [(step, path) for path in folder.glob("checkpoint-*") if (step := parse_checkpoint_step(path)) is not None]
    return [path for _, path in sorted(steps, reverse=True) if path.is_dir()]


def parse_checkpoint_step(checkpoint: Path) -> int | None:
    """Return the step in a checkpoint's name; None for another name."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


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
