"""Records by number: the same ones as a plain reading of the file gives, whoever reads and in whatever order."""

import json
import multiprocessing
import pickle

import numpy as np
import pytest

from internvl.constants import UnusableSample
from internvl.data import annotations
from internvl.data.annotations import JsonlFile


def write(path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_same_records_as_a_plain_reading(tmp_path, monkeypatch, newline, end, chunk):
    monkeypatch.setattr(annotations, "CHUNK", chunk)  # offsets must not depend on how the file is scanned
    records = [{"id": i, "text": "天空 é\u2028\\n" * i} for i in range(9)]
    lines = [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)]
    lines.insert(4, "")  # blank lines hold no record but count as lines
    file = JsonlFile(write(tmp_path / "a.jsonl", newline.join(lines) + end.replace("\n", newline)))
    assert len(file) == 9
    assert [file[i] for i in (8, 0, 5, 3, 1, 2, 4, 7, 6)] == [records[i] for i in (8, 0, 5, 3, 1, 2, 4, 7, 6)]
    assert [file.line(i) for i in range(9)] == [1, 2, 3, 4, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("text", ["{\n{}", "{}\n{", "{}\r\n5\r\n\r\n"])
def test_a_line_of_one_byte_is_not_lost(tmp_path, text):
    file = JsonlFile(write(tmp_path / "a.jsonl", text))
    assert len(file) == 2
    with pytest.raises(UnusableSample, match="is not JSON|is a JSON int"):
        [file[0], file[1]]


def test_empty_file_has_no_records(tmp_path):
    assert len(JsonlFile(write(tmp_path / "a.jsonl", ""))) == 0


@pytest.mark.parametrize(
    "line, reason",
    [("{'a': 1}", "line 2 is not JSON"), ("[1]", "line 2 is a JSON list"), ('{"a": "\udcff"}', "line 2 is not JSON")],
)
def test_a_line_that_is_no_object_is_a_bad_sample_and_the_others_stay_good(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 0}\n' + line.encode(errors="surrogateescape") + b'\n{"id": 2}\n')
    file = JsonlFile(str(path))
    with pytest.raises(UnusableSample, match=reason):
        file[1]
    assert (file[0], file[2]) == ({"id": 0}, {"id": 2})


@pytest.mark.parametrize("name, reason", [("absent.jsonl", "does not exist"), ("a.json", "must be a .jsonl file")])
def test_wrong_path_is_one_sentence(tmp_path, name, reason):
    with pytest.raises(ValueError, match=f"{name}.*{reason}"):
        JsonlFile(str(tmp_path / name))


def test_offsets_of_a_large_file_are_found_once_and_not_handed_to_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(annotations, "LARGE", 1000)
    path = write(tmp_path / "a.jsonl", "".join(f'{{"id": {i}}}\n\n' for i in range(500)))
    first = JsonlFile(path)
    (table,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(annotations, "_line_table", None)  # it would fail
        again = JsonlFile(path)
        copy = pickle.loads(pickle.dumps(again))
    assert len(pickle.dumps(again)) < 1000 and isinstance(again._table, np.memmap)
    for file in (first, again, copy):
        assert len(file) == 500 and file[499] == {"id": 499} and file.line(499) == 999
    table.write_bytes(table.read_bytes()[:300])
    assert JsonlFile(path)[499] == {"id": 499}, "a damaged table is made anew"
    write(tmp_path / "a.jsonl", '{"id": 7, "other": true}\n' * 100)
    assert len(JsonlFile(path)) == 100 and JsonlFile(path)[99]["id"] == 7


@pytest.mark.parametrize("ending, tool", [(".gz", "gunzip"), (".zst", "zstd -d")])
def test_compressed_files_are_refused_with_the_way_out(tmp_path, ending, tool):
    with pytest.raises(ValueError, match=rf"a.jsonl{ending} is compressed.*unpack it first \({tool} "):
        JsonlFile(write(tmp_path / f"a.jsonl{ending}", ""))


def read_all(file: JsonlFile, order: list[int]):
    assert [file[i]["id"] for i in order] == order


def test_forked_workers_do_not_disturb_each_other(tmp_path):
    file = JsonlFile(
        write(tmp_path / "a.jsonl", "".join(f'{{"id": {i}, "x": "{"y" * (i % 97)}"}}\n' for i in range(500)))
    )
    file[0]  # opened before the fork, so the workers share the open file
    orders = [list(range(start, 500, 3)) * 150 for start in range(3)]
    fork = multiprocessing.get_context("fork")  # hands the file over without pickling
    workers = [fork.Process(target=read_all, args=(file, order)) for order in orders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


def test_pickled_while_open(tmp_path):
    file = JsonlFile(write(tmp_path / "a.jsonl", '{"id": 0}\n{"id": 1}\n'))
    file[0]
    assert pickle.loads(pickle.dumps(file))[1] == {"id": 1}
