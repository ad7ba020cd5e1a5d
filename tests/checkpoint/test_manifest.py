"""Untrusted manifests: no name in them is opened, every value is checked."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from internvl.checkpoint.manifest import MANIFEST_FILE, find_checkpoint_errors, write_manifest
from internvl.checkpoint.safe_load import refuse_unsafe_pickles


@pytest.fixture
def small_checkpoint(tmp_path) -> Path:
    """Write a checkpoint of three files and its manifest."""
    folder = tmp_path / "checkpoint-3"
    (folder / "mlp1").mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    (folder / "mlp1/adapter_model.safetensors").write_bytes(b"weights")
    (folder / "optimizer.pt").write_bytes(bytes(3000))
    write_manifest(folder, is_writer=True, block=1000)
    return folder


def test_no_file_outside_the_checkpoint_is_opened(small_checkpoint, tmp_path):
    """The names in the manifest lead to a file that exists, and to a FIFO, which would block."""
    (tmp_path / "outside").write_bytes(b"weights")
    os.mkfifo(tmp_path / "fifo")
    manifest = json.loads((small_checkpoint / MANIFEST_FILE).read_text())
    entry = manifest["files"]["mlp1/adapter_model.safetensors"]
    names = ["../outside", "../fifo", str(tmp_path / "outside"), "./optimizer.pt", "mlp1/../optimizer.pt", "mlp1", ""]
    for name in names:
        changed = manifest | {"files": manifest["files"] | {name: entry}}
        (small_checkpoint / MANIFEST_FILE).write_text(json.dumps(changed))
        assert find_checkpoint_errors(small_checkpoint) == [f"{name} is missing"]


@pytest.mark.parametrize("make_fn", [os.mkfifo, lambda path: path.symlink_to("optimizer.pt"), Path.mkdir])
def test_irregular_files_and_unlisted_weights_are_errors(small_checkpoint, make_fn):
    assert find_checkpoint_errors(small_checkpoint) == []
    (small_checkpoint / "mlp1/README.md").write_text("a note")
    (small_checkpoint / "pytorch_model.bin").write_bytes(b"of zero_to_fp32.py")
    (small_checkpoint / "pytorch_model.bin.index.json").write_text("{}")
    assert find_checkpoint_errors(small_checkpoint) == [], "nothing reads these files"
    (small_checkpoint / "model.safetensors").write_bytes(b"")
    assert find_checkpoint_errors(small_checkpoint) == ["model.safetensors is not in manifest.json"]
    (small_checkpoint / "model.safetensors").unlink()
    (small_checkpoint / "mlp1/adapter_model.safetensors").unlink()
    make_fn(small_checkpoint / "mlp1/adapter_model.safetensors")
    errors = "; ".join(find_checkpoint_errors(small_checkpoint))
    assert re.search("adapter_model.safetensors is (missing|not a regular file|a symbolic link)", errors)


WRONG_MANIFESTS = {
    "list": "[1]",
    "no files": '{"block": 1}',
    "files is a list": '{"block": 1, "files": []}',
    "block is infinite": '{"block": Infinity, "files": {}}',
    "block is 0": '{"block": 0, "files": {}}',
    "entry is a list": '{"block": 1, "files": {"optimizer.pt": []}}',
    "no size": '{"block": 1000, "files": {"optimizer.pt": {"crc32": ["0", "0", "0"]}}}',
    "negative size": '{"block": 1000, "files": {"optimizer.pt": {"size": -1, "crc32": ["0"]}}}',
    "size is infinite": '{"block": 1000, "files": {"optimizer.pt": {"size": Infinity, "crc32": ["0"]}}}',
    "too few checksums": '{"block": 1000, "files": {"optimizer.pt": {"size": 3000, "crc32": ["0"]}}}',
    "checksums are a text": '{"block": 1000, "files": {"optimizer.pt": {"size": 3000, "crc32": "000"}}}',
    "nested deeply": '{"files":' * 100_000,
}


@pytest.mark.parametrize("text", WRONG_MANIFESTS.values(), ids=WRONG_MANIFESTS)
def test_wrong_manifest_is_damaged(small_checkpoint, text):
    (small_checkpoint / MANIFEST_FILE).write_text(text)
    errors = find_checkpoint_errors(small_checkpoint)
    assert any(error.startswith("manifest.json is damaged") for error in errors), errors
    assert all(len(error.splitlines()) == 1 and len(error) < 300 for error in errors)


@pytest.mark.stress
def test_huge_manifest_takes_seconds(small_checkpoint):
    entries = ",".join(f'"{index}":{{"size":0,"crc32":["0"]}}' for index in range(1_000_000))
    (small_checkpoint / MANIFEST_FILE).write_text(f'{{"block": 1, "files": {{{entries}}}}}')
    start = time.monotonic()
    errors = find_checkpoint_errors(small_checkpoint)
    assert len(errors) > 1_000_000 and time.monotonic() - start < 30
    with (small_checkpoint / MANIFEST_FILE).open("ab") as file:
        file.truncate(2**27)
    assert find_checkpoint_errors(small_checkpoint) == ["manifest.json is damaged"]


def test_fifo_among_pickles_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "optimizer.pt")
    with pytest.raises(OSError, match="optimizer.pt is a FIFO, not a regular file"):
        refuse_unsafe_pickles(tmp_path)
