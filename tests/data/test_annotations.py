"""Annotation files: JSONL and tables give the same records."""

import json
import multiprocessing
import pickle

import datasets
import numpy as np
import pytest
from helpers.samples import are_samples_equal, make_turns

from internvl.constants import UnusableSample
from internvl.data import annotations
from internvl.data.annotations import JsonlFile, TableFile, is_table, open_annotations
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.sample_lengths import measure_dataset


def write(path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


# -- JSONL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_records_equal_a_plain_reading(tmp_path, monkeypatch, newline, end, chunk_bytes):
    monkeypatch.setattr(annotations, "SCAN_CHUNK_BYTES", chunk_bytes)  # offsets must not depend on it
    records = [{"id": i, "text": "天空 é\u2028\\n" * i} for i in range(9)]
    lines = [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)]
    lines.insert(4, "")  # blank lines hold no record but count as lines
    file = JsonlFile(write(tmp_path / "a.jsonl", newline.join(lines) + end.replace("\n", newline)))
    assert len(file) == 9
    assert [file[i] for i in (8, 0, 5, 3, 1, 2, 4, 7, 6)] == [records[i] for i in (8, 0, 5, 3, 1, 2, 4, 7, 6)]
    assert [file.line_number(i) for i in range(9)] == [1, 2, 3, 4, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("text", ["{\n{}", "{}\n{", "{}\r\n5\r\n\r\n"])
def test_lines_of_one_byte_are_kept(tmp_path, text):
    file = JsonlFile(write(tmp_path / "a.jsonl", text))
    assert len(file) == 2
    with pytest.raises(UnusableSample, match="is not JSON|expected a JSON object, got int"):
        [file[0], file[1]]


def test_empty_file_has_no_records(tmp_path):
    assert len(JsonlFile(write(tmp_path / "a.jsonl", ""))) == 0


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{'a': 1}", "line 2 is not JSON"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ('{"a": "\udcff"}', "line 2 is not JSON"),
    ],
)
def test_malformed_line_is_an_unusable_sample_and_others_are_read(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 0}\n' + line.encode(errors="surrogateescape") + b'\n{"id": 2}\n')
    file = JsonlFile(str(path))
    with pytest.raises(UnusableSample, match=reason):
        file[1]
    assert (file[0], file[2]) == ({"id": 0}, {"id": 2})


@pytest.mark.parametrize("name, reason", [("absent.jsonl", "does not exist"), ("a.json", "must be a .jsonl file")])
def test_wrong_path_is_reported(tmp_path, name, reason):
    with pytest.raises(ValueError, match=f"{name}.*{reason}"):
        open_annotations(str(tmp_path / name))


@pytest.mark.parametrize("extension, command", [(".gz", "gunzip"), (".zst", "zstd -d")])
def test_compressed_files_are_refused_with_the_command_to_unpack(tmp_path, extension, command):
    with pytest.raises(ValueError, match=rf"a.jsonl{extension} is compressed.*unpack it first \({command} "):
        open_annotations(write(tmp_path / f"a.jsonl{extension}", ""))


def test_line_table_of_a_large_file_is_cached_and_not_pickled(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(annotations, "LARGE_FILE_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", "".join(f'{{"id": {i}}}\n\n' for i in range(500)))
    first = JsonlFile(path)
    (table_file,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(annotations, "_scan_lines", None)  # a second scan would fail
        again = JsonlFile(path)
        copy = pickle.loads(pickle.dumps(again))
    assert len(pickle.dumps(again)) < 1000 and isinstance(again._line_table, np.memmap)
    for file in (first, again, copy):
        assert len(file) == 500 and file[499] == {"id": 499} and file.line_number(499) == 999
    table_file.write_bytes(table_file.read_bytes()[:300])
    assert JsonlFile(path)[499] == {"id": 499}, "a damaged table is recomputed"
    write(tmp_path / "a.jsonl", '{"id": 7, "other": true}\n' * 100)
    assert len(JsonlFile(path)) == 100 and JsonlFile(path)[99]["id"] == 7


def read_all(file: JsonlFile, order: list[int]):
    assert [file[i]["id"] for i in order] == order


@pytest.mark.multiprocess
def test_forked_workers_read_the_right_records(tmp_path):
    lines = [f'{{"id": {i}, "x": "{"y" * (i % 97)}"}}\n' for i in range(500)]
    file = JsonlFile(write(tmp_path / "a.jsonl", "".join(lines)))
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
    file = JsonlFile(write(tmp_path / "a.jsonl", '{"id": 0}\n{"id": 1}\n'))
    file[0]
    assert pickle.loads(pickle.dumps(file))[1] == {"id": 1}


# -- tables ------------------------------------------------------------------------------------------------------------

RECORDS = [
    {"id": 1, "image": "a.png", "conversations": make_turns("<image>\nWhat is it?", "A house.")},
    {"id": 2, "conversations": make_turns("Hello?", "Yes.", "And?", "No.")},
    {"id": 3, "image": "absent.png", "conversations": make_turns("What?", "A.")},
]


def write_table(kind: str, folder) -> str:
    table = datasets.Dataset.from_list(RECORDS)
    if kind == "parquet":
        table.to_parquet(folder / "data.parquet")
        return str(folder / "data.parquet")
    if kind == "folder of parquet":
        for shard in range(2):
            table.shard(2, shard, contiguous=True).to_parquet(folder / f"shards/{shard}.parquet")
        return str(folder / "shards")
    table.save_to_disk(folder / "saved")
    return str(folder / "saved/data-00000-of-00001.arrow" if kind == "arrow" else folder / "saved")


@pytest.mark.parametrize("kind", ["parquet", "folder of parquet", "arrow", "saved"])
def test_table_gives_the_samples_of_the_same_records_in_jsonl(make_dataset, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    jsonl = make_dataset(*RECORDS)
    path = write_table(kind, tmp_path)
    entry = {"root": str(tmp_path), "annotation": path}
    table = LazySupervisedDataset("mine", entry, jsonl.tokenizer, 4, jsonl.data_args)
    assert is_table(path) and len(table) == 3
    table = pickle.loads(pickle.dumps(table))
    for index in range(2):
        assert are_samples_equal(table.get(index, 0), jsonl.get(index, 0))
    measured, expected = measure_dataset(table, show_progress=False), measure_dataset(jsonl, show_progress=False)
    assert measured.lengths.tolist() == expected.lengths.tolist()
    assert measured.unusable == expected.unusable and len(set(measured.digests.tolist())) == 3
    assert table.describe(2) == f"mine line 3 ({path})"
    again = LazySupervisedDataset("mine", entry, jsonl.tokenizer, 4, jsonl.data_args)
    assert again.annotations.version == table.annotations.version
    assert again.checksum_record(1) == measured.digests[1]


def test_tables_that_cannot_be_opened_are_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.parquet").write_text(json.dumps(RECORDS))
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(tmp_path / "splits")
    for name, reason in (
        ("a.parquet", "cannot be opened as a table"),
        ("empty", "cannot be opened as a table"),
        ("splits", r"has several splits \(train\): pass the folder of one"),
        ("absent.parquet", "does not exist"),
    ):
        with pytest.raises(ValueError, match=f"{name} {reason}"):
            TableFile(str(tmp_path / name))
