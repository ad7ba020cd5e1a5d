"""Files of unknown origin: only regular ones are opened, JSON and safetensors headers are bounded."""

import os
import re
import socket
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from internvl.regular_files import (
    copy_regular_file,
    open_regular_file,
    read_json,
    read_json_object,
    read_safetensors_header,
    require_regular_files,
)

LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)  # the path itself may be too long for a socket
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


IRREGULAR = {
    "FIFO": os.mkfifo,
    "link to a FIFO": lambda path: (os.mkfifo(path.parent / "fifo"), path.symlink_to("fifo")),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "socket": make_socket,
}


@pytest.mark.parametrize("make_fn", IRREGULAR.values(), ids=IRREGULAR)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make_fn):
    file = tmp_path / "x.json"
    make_fn(file)
    read_fns = (
        open_regular_file,
        read_json,
        read_safetensors_header,
        lambda file: copy_regular_file(file, tmp_path / "y"),
    )
    for read_fn in read_fns:
        with pytest.raises(OSError, match=r"x.json is a (FIFO|device|socket or device), not a regular file"):
            read_fn(file)
    with pytest.raises(OSError, match=r"(x.json|fifo) is a .*, not a regular file"):
        require_regular_files(tmp_path)


def test_regular_files_are_opened_as_usual(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    with open_regular_file(tmp_path / "link", max_bytes=7) as file:
        assert file.read() == b"content" and os.get_blocking(file.fileno())
        assert stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    require_regular_files(tmp_path)
    with pytest.raises(OSError, match="file has 7 bytes, more than 6"):
        open_regular_file(tmp_path / "file", max_bytes=6)
    with pytest.raises(FileNotFoundError):
        open_regular_file(tmp_path / "dangling")
    with pytest.raises(IsADirectoryError):
        open_regular_file(tmp_path / "folder")


WRONG_JSON = {
    '{"a": 1': "is not JSON",
    "": "is not JSON",
    '{"a":' * 100_000 + "1" + "}" * 100_000: "nested too deeply",
    "[1]": "expected a JSON object, got a JSON list",
    "1" * 10_000: "is not JSON: Exceeds the limit",
    LFS_POINTER: "is a pointer of Git LFS.*git lfs pull",
    "\udcff": "is not JSON: 'utf-8' codec",
}


@pytest.mark.parametrize("text", WRONG_JSON, ids=range(len(WRONG_JSON)))
def test_wrong_json_is_one_sentence(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=WRONG_JSON[text]) as caught:
        read_json_object(tmp_path / "x.json")
    assert "x.json" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "x.json").write_text('\ufeff{"a": [1]}', encoding="utf-8")
    assert read_json_object(tmp_path / "x.json") == {"a": [1]}
    with pytest.raises(OSError, match="more than 5"):
        read_json(tmp_path / "x.json", max_bytes=5)


def test_header_of_a_safetensors_file(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}, file, metadata={"format": "pt"})
    header, start = read_safetensors_header(file)
    assert header["a"]["shape"] == [2, 3] and header["b"]["dtype"] == "BF16"
    assert start + max(entry["data_offsets"][1] for entry in header.values()) == file.stat().st_size
    content = file.read_bytes()
    wrong = {b"": "header too small", content[:-1]: "not a complete", b"\xff" * 8 + content[8:]: "header too large"}
    for changed, message in wrong.items():
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=f"x.safetensors is not a complete safetensors file .*{message}|{message}"):
            read_safetensors_header(file)
    file.write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=re.escape(f"{file} is a pointer of Git LFS")):
        read_safetensors_header(file)
    with pytest.raises(ValueError, match="pointer of Git LFS"):
        require_regular_files(tmp_path)
