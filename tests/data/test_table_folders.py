"""Folders as annotation: of one split, or refused with what to pass instead."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from internvl.data.annotations import open_annotations

TABLE = pa.Table.from_pylist([{"id": 0}, {"id": 1}])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_folders_without_a_table_are_reported_with_what_to_do(tmp_path):
    for name in ("snapshot/data", "mixed"):
        (tmp_path / name).mkdir(parents=True)
        for split in ("train-00000-of-00002", "train-00001-of-00002"):
            pq.write_table(TABLE, tmp_path / name / f"{split}.Parquet")
    assert len(open_annotations(str(tmp_path / "snapshot/data"))) == 2 * len(TABLE)
    pq.write_table(TABLE, tmp_path / "mixed/test.parquet")
    for name in ("lines", "outer/default/lines", "arrow"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("lines/a.jsonl", "lines/b.jsonl", "outer/default/lines/a.ndjson", "arrow/a-00000-of-00001.arrow"):
        (tmp_path / name).touch()
    for name, reason in (
        ("snapshot", "is a folder whose records are in a folder below: pass .*/snapshot/data, or a file in it"),
        ("mixed", r"has several splits \(test, train\): pass single files, or a folder with the files of one split"),
        ("lines", r"is a folder of JSON lines \(a.jsonl, ...\): pass one file per dataset, or concatenate them"),
        ("outer", "is a folder whose records are in a folder below: pass .*/outer/default/lines, or a file in it"),
        ("arrow", "is a folder without state.json .*: pass one of its .arrow files"),
    ):
        with pytest.raises(ValueError, match=f"/{name} {reason}"):
            open_annotations(str(tmp_path / name))


@pytest.mark.parametrize("names", [["a", "b"], ["train_1", "train_2"], ["train-00000-of-00001", "trains"], ["test"]])
def test_folder_of_one_split(tmp_path, names):
    for name in [*names, "testament"]:
        pq.write_table(TABLE, tmp_path / f"{name}.parquet")
    assert len(open_annotations(str(tmp_path))) == (len(names) + 1) * len(TABLE)
