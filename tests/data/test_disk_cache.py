"""Cache files: whatever happens to one, the results are those of a fresh computation."""

import errno
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from internvl.data import annotations
from internvl.data.annotations import open_annotations
from internvl.data.disk_cache import find_cache_file, get_cache_dir, make_cache_file, write_cache_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def damage(content: bytes, generator: random.Random) -> bytes:
    """Flip bits, cut or extend."""
    damaged, kind = bytearray(content), generator.randrange(6)
    if kind == 0:
        return content[: generator.randrange(len(content))]
    if kind == 1:
        return content + generator.randbytes(9)
    for _ in range(kind - 1):
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


def test_damaged_tables_and_line_tables_are_made_again(tmp_path, cache, monkeypatch, caplog):
    monkeypatch.setattr(annotations, "LARGE_FILE_BYTES", 1)
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": range(20), "text": ["x" * i for i in range(20)]}), path)
    first = open_annotations(path)
    records, content_id = [first[index] for index in range(20)], first.content_id
    assert sorted(file.name.split("-")[0] for file in cache.iterdir()) == ["lines", "table"]
    generator = random.Random(0)
    for _ in range(60):
        for kind in ("lines", "table"):
            # A table that is made again has a new time, and so another line table.
            (file,) = cache.glob(f"{kind}-*")
            content = file.read_bytes()
            file.write_bytes(damage(content, generator))
            caplog.clear()
            opened = open_annotations(path)
            assert [opened[index] for index in range(20)] == records and opened.content_id == content_id
            assert f"Damaged cache file: {file} (checksum mismatch)" in caplog.text
            if kind == "table":
                assert file.read_bytes() == content
                for old_lines in cache.glob("lines-*"):
                    old_lines.unlink()
                open_annotations(path)


def test_exchanged_files_are_not_used(tmp_path, cache, caplog):
    one = write_cache_file(str(cache / "copy-one"), ".jsonl", lambda file: file.write(b"1"))
    two = write_cache_file(str(cache / "copy-two"), ".jsonl", lambda file: file.write(b"2"))
    os.rename(two, one)
    assert find_cache_file(str(cache / "copy-one"), ".jsonl") is None
    assert f"Damaged cache file: {one} (checksum mismatch)" in caplog.text
    renamed = one.replace(one[-14:-6], two[-14:-6])
    Path(renamed).write_bytes(b"2")
    assert find_cache_file(str(cache / "copy-one"), ".jsonl") is None, "the checksum is that of another stem"


def test_file_is_made_once_by_processes_that_start_together(cache):
    calls = []

    def write(file):
        calls.append(threading.get_ident())
        time.sleep(0.2)
        file.write(b"content")

    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: make_cache_file(str(cache / "copy-a"), ".jsonl", write), range(4)))
    assert len(calls) == len(paths) == 1 and Path(paths.pop()).read_bytes() == b"content"
    assert len(list(cache.iterdir())) == 1


def test_full_disk_is_reported_and_errors_of_the_source_are_not_blamed_on_the_cache(cache):
    def fail(number: int):
        def write(file):
            file.write(b"half")
            raise OSError(number, os.strerror(number))

        return write

    with pytest.raises(ValueError, match="copy-a.jsonl cannot be written .No space left.*set INTERNVL_CACHE"):
        make_cache_file(str(cache / "copy-a"), ".jsonl", fail(errno.ENOSPC))
    with pytest.raises(OSError, match="Connection reset"):
        make_cache_file(str(cache / "copy-a"), ".jsonl", fail(errno.ECONNRESET))
    assert list(cache.iterdir()) == [], "nothing is left"


def test_cache_below_a_file_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "file/cache"))
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": [1]}), path)
    with pytest.raises(ValueError, match="file/cache/table-.*cannot be written .Not a directory.*set INTERNVL_CACHE"):
        open_annotations(path)


def test_cache_dir_without_a_home_is_one_error(monkeypatch):
    monkeypatch.delenv("INTERNVL_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)  # not in /etc/passwd, as in many containers
    with pytest.raises(ValueError, match="there is no home directory for the cache: set INTERNVL_CACHE"):
        get_cache_dir()
