"""Annotation files: records equal a plain reading; what is damaged or changed is named."""

import gzip
import json
import multiprocessing
import os
import pickle
import re
import socket
import zlib

import numpy as np
import pytest

from internvl.constants import UnusableSample
from internvl.data import annotations
from internvl.data.annotations import AnnotationFile, open_annotations


def write(path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_records_equal_a_plain_reading(tmp_path, monkeypatch, newline, end, chunk_bytes):
    monkeypatch.setattr(annotations, "SCAN_CHUNK_BYTES", chunk_bytes)  # offsets must not depend on it
    records = [{"id": i, "text": "天空 é\u2028\\n" * i} for i in range(9)]
    lines = [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)]
    lines.insert(4, "")  # blank lines hold no record but count as lines
    file = open_annotations(write(tmp_path / "a.jsonl", newline.join(lines) + end.replace("\n", newline)))
    assert len(file) == 9
    assert [file[i] for i in (8, 0, 5, 3, 1, 2, 4, 7, 6)] == [records[i] for i in (8, 0, 5, 3, 1, 2, 4, 7, 6)]
    assert [file.line_number(i) for i in range(9)] == [1, 2, 3, 4, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("text", ["{\n{}", "{}\n{", "{}\r\n5\r\n\r\n"])
def test_lines_of_one_byte_are_kept(tmp_path, text):
    file = open_annotations(write(tmp_path / "a.jsonl", text))
    assert len(file) == 2
    with pytest.raises(UnusableSample, match="is not JSON|expected a JSON object, got int"):
        [file[0], file[1]]


def test_empty_file_has_no_records(tmp_path):
    for text in ("", "\n\n", "\ufeff", "\r\n"):
        assert len(open_annotations(write(tmp_path / "a.jsonl", text))) == 0


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{'a': 1}", "line 2 is not JSON"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ('{"a": "\udcff"}', "line 2 is not JSON: it is not UTF-8"),
        ('{"a": "\udced\udca0\udc80"}', "line 2 is not JSON: it is not UTF-8"),  # a surrogate in UTF-8
        ("null", "line 2: expected a JSON object, got NoneType"),
        ('{"a": \0}', "line 2 is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "line 2 is not JSON: Exceeds the limit"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2 is nested too deeply: more than 64 levels"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "line 2 is nested too deeply"),
        ('{"image": "a", "id": 1, "image": "b"}', "line 2 is ambiguous: the key 'image' is used twice"),
        ('{"a" : 1,\t"a"\t:1}', "line 2 is ambiguous: the key 'a' is used twice"),
        ('{"a": [{"from": "x", "from": "y"}]}', "line 2 is ambiguous: the key 'from' is used twice"),
        ('{"\\u0061": 1, "a": 1}', "line 2 is ambiguous: the key 'a' is used twice"),
        ('{"\\ud800": 1, "\\ud800": 1}', r"line 2 is ambiguous: the key '\\ud800' is used twice"),
    ],
)
def test_malformed_line_is_an_unusable_sample_and_others_are_read(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 0}\n' + line.encode(errors="surrogateescape") + b'\n{"id": 2}\n')
    file = open_annotations(str(path))
    with pytest.raises(UnusableSample, match=reason):
        file[1]
    assert (file[0], file[2]) == ({"id": 0}, {"id": 2})


@pytest.mark.parametrize(
    "name, reason",
    [
        ("absent.jsonl", "does not exist"),
        ("absent", "does not exist"),
        ("folder/*.jsonl", "does not exist .*; patterns, ~ and variables are not"),
        ("$DATA/a.jsonl", "does not exist .*; patterns, ~ and variables are not supported"),
        ("a.json", "must be a .jsonl file.*json2jsonl.py"),
        ("a.csv", "must be a .jsonl file.*pandas converts it: to_json"),
        ("a.txt", "must be a .jsonl file.*json2jsonl.py"),
        ("s3://bucket/folder", "must be a .jsonl file.*a local folder"),
    ],
)
def test_wrong_path_is_reported(tmp_path, name, reason):
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*{reason}"):
        open_annotations(name if "://" in name else str(tmp_path / name))


@pytest.mark.parametrize("extension", [".jsonl", ".JSONL", ".ndjson", ".NDJSON", ".jsonlines", ".Jsonl"])
def test_extensions_of_json_lines(tmp_path, extension):
    assert open_annotations(write(tmp_path / f"a.b{extension}", '{"id": 0}\n'))[0] == {"id": 0}


@pytest.mark.parametrize(
    "extension, command", [(".gz", "gunzip"), (".zst", "zstd -d"), (".GZ", "gunzip"), (".zip", "unzip")]
)
def test_compressed_files_are_refused_with_the_command_to_unpack(tmp_path, extension, command):
    with pytest.raises(ValueError, match=rf"a.jsonl{extension} is compressed.*unpack it first \({command} "):
        open_annotations(write(tmp_path / f"a.jsonl{extension}", ""))


@pytest.mark.parametrize(
    "content, reason",
    [
        (gzip.compress(b'{"id": 0}', mtime=0), "is compressed by gzip: unpack it first"),
        (b"PK\x03\x04 and so on", "is a ZIP archive"),
        (b"PAR1 and so on PAR1", "is a Parquet file: rename it to .parquet"),
        (b"ARROW1\0\0", "is an Arrow file: rename it to .arrow"),
        ('{"id": 0}'.encode("utf-16"), "is in UTF-16, expected UTF-8: convert it"),
        ('{"id": 0}'.encode("utf-16-be"), "is in UTF-16, expected UTF-8: convert it"),
        (b'{\n  "id": 0\n}\n', r"has objects over several lines, expected one per line: convert it \(jq -c .\)"),
        (b"\n<!DOCTYPE html><html>404", "is an HTML or XML page: download the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
    ],
)
def test_other_formats_under_the_name_of_json_lines_are_reported(tmp_path, content, reason):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.jsonl {reason}"):
        open_annotations(str(tmp_path / "a.jsonl"))


def test_special_values_are_read(tmp_path):
    """What JSON writers produce; `schema.py` judges it."""
    text = '\ufeff{"a": NaN, "b": -Infinity, "c": "\\ud83d", "d": ' + "[" * 62 + "]" * 62 + "}"
    record = open_annotations(write(tmp_path / "a.jsonl", text))[0]
    assert record["a"] != record["a"] and record["b"] == float("-inf") and record["c"] == "\ud83d"


def test_array_instead_of_lines_is_reported_with_the_way_out(tmp_path):
    records = [{"id": 0}, {"id": 1}]
    for text in (json.dumps(records), json.dumps(records, indent=2), "\n  " + json.dumps(records), "[\r\n{}]"):
        with pytest.raises(ValueError, match=r"a.jsonl is a JSON array.*json2jsonl.py converts it"):
            open_annotations(write(tmp_path / "a.jsonl", text))


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.jsonl")
    os.mkfifo(tmp_path / "fifo.parquet")
    (tmp_path / "link.jsonl").symlink_to("fifo.jsonl")
    (tmp_path / "null.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.jsonl"))
    for name, reason in {
        "fifo.jsonl": "is a FIFO, not a regular file",
        "fifo.parquet": "is a FIFO, not a regular file",
        "link.jsonl": "is a FIFO, not a regular file",
        "null.jsonl": "is a device, not a regular file",
        "socket.jsonl": "is a socket or device, not a regular file",
        "folder.jsonl": "is a folder, but it has no .parquet files",
    }.items():
        with pytest.raises(ValueError, match=f"annotation file .*{name}.*{reason}"):
            open_annotations(str(tmp_path / name))


def test_long_lines_are_not_read(tmp_path, measure_memory_peak):
    """A sparse file of 1 GB is one line of zero bytes."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 0}\n')
    os.truncate(path, 1 << 30)
    measure_memory_peak()
    file = open_annotations(str(path))
    with pytest.raises(UnusableSample, match="line 2 has 1,073,741,814 bytes, at most 33,554,432 are supported"):
        file[1]
    assert file[0] == {"id": 0} and measure_memory_peak() < 100 << 20


def test_blank_lines_take_no_memory(tmp_path, measure_memory_peak):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * (64 << 20) + b'{"id": 0}')
    measure_memory_peak()
    assert annotations.scan_lines(str(path))["number"].tolist() == [1 + (64 << 20)]
    assert measure_memory_peak() < 300 << 20


def test_checksums_are_those_of_the_lines(tmp_path, monkeypatch):
    lines = [b'{"id": %d, "x": "%s"}' % (i, b"y" * i) for i in range(50)]
    (tmp_path / "a.jsonl").write_bytes(b"\n\n".join(lines))
    for chunk_bytes in (1, 10, 64, 1 << 20):
        monkeypatch.setattr(annotations, "SCAN_CHUNK_BYTES", chunk_bytes)
        file = open_annotations(str(tmp_path / "a.jsonl"))
        assert file.checksums.tolist() == [zlib.crc32(line) for line in lines]


# -- changed files -----------------------------------------------------------------------------------------------------


def change_in_place(path, content: bytes) -> None:
    path.write_bytes(content)


def change_by_rename(path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize("has_been_read", [False, True])
@pytest.mark.parametrize("change", [change_in_place, change_by_rename])
def test_changed_record_is_an_unusable_sample(tmp_path, change, has_been_read):
    """Whether the file was rewritten or renamed, before or after the first reading."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id": 1}\n{"id": 2}\n')
    file = open_annotations(str(path))
    if has_been_read:
        assert file[1] == {"id": 1}
    stamp = path.stat().st_mtime_ns
    change(path, b'{"id": 0}\n{"id": 7}\n{"id": 2}\n')
    os.utime(path, ns=(stamp, stamp))
    file = file if has_been_read else pickle.loads(pickle.dumps(file))
    assert [file[0], file[2]] == [{"id": 0}, {"id": 2}], "equal records are read"
    if has_been_read and change is change_by_rename:
        assert file[1] == {"id": 1}, "the opened file is read"
    else:
        with pytest.raises(
            UnusableSample, match=f"line 2 is not what it was when the run opened {path}.*has been changed"
        ):
            file[1]


def test_shortened_or_deleted_file_gives_unusable_samples(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id": 1}\n')
    shortened, deleted = open_annotations(str(path)), open_annotations(str(path))
    os.truncate(path, 12)
    with pytest.raises(UnusableSample, match="line 2 .*checksum mismatch"):
        shortened[1]
    path.unlink()
    with pytest.raises(UnusableSample, match="its annotation file .*a.jsonl was removed during the run"):
        deleted[0]


# -- large files and processes -----------------------------------------------------------------------------------------


def test_line_table_of_a_large_file_is_cached_and_not_pickled(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(annotations, "LARGE_FILE_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", "".join(f'{{"id": {i}}}\n\n' for i in range(500)))
    first = open_annotations(path)
    (table_file,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(annotations, "scan_lines", None)  # a second scan would fail
        again = open_annotations(path)
        copy = pickle.loads(pickle.dumps(again))
    assert len(pickle.dumps(again)) < 1000 and isinstance(again._lines, np.memmap)
    for file in (first, again, copy):
        assert len(file) == 500 and file[499] == {"id": 499} and file.line_number(499) == 999
    table_file.write_bytes(table_file.read_bytes()[:300])
    assert open_annotations(path)[499] == {"id": 499}, "a damaged table is computed again"


def test_cached_line_table_is_not_used_for_a_file_rewritten_with_its_old_time(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(annotations, "LARGE_FILE_BYTES", 10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id": 1}\n')
    stamp = path.stat().st_mtime_ns
    content_id = open_annotations(str(path)).content_id
    path.write_bytes(b'{"id": 0}\n{"id": 7}\n')
    os.utime(path, ns=(stamp, stamp))
    file = open_annotations(str(path))
    assert file[1] == {"id": 7} and file.content_id != content_id


def read_all(file: AnnotationFile, order: list[int]):
    assert [file[i]["id"] for i in order] == order


@pytest.mark.multiprocess
def test_forked_workers_read_the_right_records(tmp_path):
    lines = [f'{{"id": {i}, "x": "{"y" * (i % 97)}"}}\n' for i in range(500)]
    file = open_annotations(write(tmp_path / "a.jsonl", "".join(lines)))
    file[0]  # opened before the fork, so the workers share the open file
    orders = [list(range(start, 500, 3)) * 150 for start in range(3)]
    fork = multiprocessing.get_context("fork")  # passes the file on without pickling
    workers = [fork.Process(target=read_all, args=(file, order)) for order in orders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


def test_open_file_can_be_pickled(tmp_path):
    file = open_annotations(write(tmp_path / "a.jsonl", '{"id": 0}\n{"id": 1}\n'))
    file[0]
    assert pickle.loads(pickle.dumps(file))[1] == {"id": 1}
