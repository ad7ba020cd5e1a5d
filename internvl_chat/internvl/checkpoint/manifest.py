"""Which checkpoint is whole: each carries a manifest of its files, written last, which is checked before one is read.

Beside `checkpointing.py`, which writes checkpoints, and `check.py`, which chooses the one to go on from. Checksums are
CRC-32 of blocks, so that all cores and all ranks work on one large file: they find what disks and torn writes do, at
the speed at which files are read anyway, and are no defence against a forger.

    {"block": bytes, "files": {"mlp1/adapter_model.safetensors": {"size": bytes, "crc32": [one a block]}, ...}}
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from internvl.dist_utils import gather_objects, num_cores, rank, run_on_rank_0, world_size

MANIFEST_FILE = "manifest.json"
BLOCK_BYTES = 2**26  # bytes
TRAINER_STATE_FILE = "trainer_state.json"  # transformers' name; every checkpoint has it
RANK_IN_NAME = re.compile(r"rank_(\d+)_mp_rank|rng_state_(\d+)")  # DeepSpeed's and transformers' files of a rank


# -- writing -----------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, write: bool, alone: bool = False, block: int = BLOCK_BYTES) -> None:
    """Note what a finished checkpoint holds, and wait until all of it is on the disk; a collective.

    Args:
        folder: of the checkpoint; every rank looks at the files it wrote, which are in its node's memory.
        write: whether this rank writes the manifest.
        alone: every node has a folder of its own, so that who writes looks at all files.
        block: bytes that have a checksum of their own.
    """
    files = [file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST_FILE]
    mine = [file for file in files if (write if alone else _writing_rank(file.name) == rank())]
    found = gather_objects(
        _map_in_threads(lambda file: (str(file.relative_to(folder)), _describe_file(file, block)), mine)
    )
    if write:
        entries = found[rank()] if alone else [entry for entries in found for entry in entries]
        manifest = folder / MANIFEST_FILE
        manifest.write_text(json.dumps({"block": block, "files": dict(sorted(entries))}, indent=1))
        fsync_paths(manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder)


def fsync_paths(*paths: Path) -> None:
    """Wait until files are on the disk, or what folders say of theirs."""
    for path in paths:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _writing_rank(name: str) -> int:
    """The rank that wrote a file, as its name tells; ranks that are gone wrote nothing."""
    found = RANK_IN_NAME.search(name)
    return int(found[1] or found[2]) % world_size() if found else 0


def _describe_file(file: Path, block: int) -> dict:
    fsync_paths(file)
    size = file.stat().st_size
    count = max(1, -(-size // block))
    return {"size": size, "crc32": _map_in_threads(lambda number: _checksum(file, number, block), range(count))}


# -- checking ----------------------------------------------------------------------------------------------------------


def find_checkpoint_errors(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, a sentence a file, the same on every rank; a collective, to which each rank
    contributes every n-th block.

    One without a manifest, of an earlier version, is only looked at for JSON and safetensors that end too early.
    """
    if not (checkpoint / TRAINER_STATE_FILE).is_file():
        found = [f"{TRAINER_STATE_FILE} is missing"]
    elif (checkpoint / MANIFEST_FILE).is_file():
        found = _errors_by_manifest(checkpoint)
    else:
        found = [fault for file in checkpoint.rglob("*") if (fault := _format_error(checkpoint, file))]
    return sorted({fault for of_rank in gather_objects(found) for fault in of_rank})


def _errors_by_manifest(checkpoint: Path) -> list[str]:
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
        files, block = manifest["files"], int(manifest["block"])
        blocks = [(name, entry, number) for name, entry in files.items() for number in range(len(entry["crc32"]))]
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST_FILE} is damaged"]

    def fault(name: str, entry: dict, number: int) -> str | None:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (found := file.stat().st_size) != entry["size"]:
            return f"{name} has {found:,} bytes, not {entry['size']:,}"
        try:
            whole = _checksum(file, number, block) == entry["crc32"][number]
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        return None if whole else f"{name} holds other bytes than were written"

    return list(filter(None, _map_in_threads(lambda one: fault(*one), blocks[rank() :: world_size()])))


def _format_error(checkpoint: Path, file: Path) -> str | None:
    name = file.relative_to(checkpoint)
    try:
        if file.suffix == ".json":
            json.loads(file.read_text())
        if file.suffix == ".safetensors":
            with open(file, "rb") as opened:
                names = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(min(names, 10**8)))
            header.pop("__metadata__", None)
            size = 8 + names + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{name} is damaged"
    return None


# -- choosing ----------------------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first, by the number of steps in their names."""
    found = [(step, path) for path in folder.glob("checkpoint-*") if (step := checkpoint_step(path)) is not None]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def checkpoint_step(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def find_latest_valid_checkpoint(folder: Path, tell: Callable[[Path, list[str]], Any]) -> Path | None:
    """The newest checkpoint in a folder without a fault, the same on every rank; None if there are none. A collective.

    Args:
        tell: called with every checkpoint that is passed over, and its faults.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    candidates = run_on_rank_0(lambda: list_checkpoints(folder))
    for checkpoint in candidates:
        if not (found := find_checkpoint_errors(checkpoint)):
            return checkpoint
        tell(checkpoint, found)
    if candidates:
        raise ValueError(
            f"no checkpoint of {len(candidates)} in {folder} is whole ({checkpoint.name}: {summarize_errors(found)}): "
            "--overwrite_output_dir True starts afresh."
        )
    return None


def summarize_errors(found: list[str]) -> str:
    """A few of the faults, for a sentence."""
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


# -- blocks ------------------------------------------------------------------------------------------------------------


def _checksum(file: Path, number: int, block: int) -> str:
    with open(file, "rb", buffering=0) as opened:
        opened.seek(number * block)
        value, left = 0, block
        while left and (part := opened.read(min(left, 2**22))):
            value, left = zlib.crc32(part, value), left - len(part)
    return f"{value:08x}"


def _map_in_threads(work: Callable, items: Iterable) -> list:
    """Reading and checksums leave Python's lock to others."""
    items = list(items)
    if len(items) < 2 or num_cores() < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(8, num_cores(), len(items))) as pool:
        return list(pool.map(work, items))
