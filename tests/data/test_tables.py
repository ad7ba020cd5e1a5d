"""Tables as annotation give the samples that the same records as JSON lines give."""

import json
import pickle

import datasets
import pytest
from helpers.samples import samples_equal, turns

from internvl.data.annotations import TableFile, is_table
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.sample_lengths import measure_dataset

RECORDS = [
    {"id": 1, "image": "a.png", "conversations": turns("<image>\nWhat is it?", "A house.")},
    {"id": 2, "conversations": turns("Hello?", "Yes.", "And?", "No.")},
    {"id": 3, "image": "gone.png", "conversations": turns("What?", "A.")},
]


def saved(kind: str, folder) -> str:
    table = datasets.Dataset.from_list(RECORDS)
    if kind == "parquet":
        table.to_parquet(folder / "data.parquet")
        return str(folder / "data.parquet")
    if kind == "folder of parquet":
        for part in range(2):
            table.shard(2, part, contiguous=True).to_parquet(folder / f"part/{part}.parquet")
        return str(folder / "part")
    table.save_to_disk(folder / "saved")
    return str(folder / "saved/data-00000-of-00001.arrow" if kind == "arrow" else folder / "saved")


@pytest.mark.parametrize("kind", ["parquet", "folder of parquet", "arrow", "saved"])
def test_a_table_gives_the_samples_of_its_records(make, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    lines = make(*RECORDS)
    path = saved(kind, tmp_path)
    entry = {"root": str(tmp_path), "annotation": path}
    table = LazySupervisedDataset("mine", entry, lines.tokenizer, 4, lines.data_args)
    assert is_table(path) and len(table) == 3
    table = pickle.loads(pickle.dumps(table))
    for index in range(2):
        assert samples_equal(table.get(index, 0), lines.get(index, 0))
    measured, expected = measure_dataset(table, progress=False), measure_dataset(lines, progress=False)
    assert [sizes.tolist() for sizes in measured.lengths] == [sizes.tolist() for sizes in expected.lengths]
    assert measured.bad == expected.bad and len(set(measured.digests.tolist())) == 3
    assert table.describe(2) == f"mine line 3 ({path})"
    again = LazySupervisedDataset("mine", entry, lines.tokenizer, 4, lines.data_args)
    assert again.records.version == table.records.version and again.digest(1) == measured.digests[1]


def test_what_is_no_table_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.parquet").write_text(json.dumps(RECORDS))
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(tmp_path / "splits")
    for name, reason in (
        ("a.parquet", "cannot be opened as a table"),
        ("empty", "cannot be opened as a table"),
        ("splits", "holds several splits, train: name the folder of one"),
        ("absent.parquet", "does not exist"),
    ):
        with pytest.raises(ValueError, match=f"{name} {reason}"):
            TableFile(str(tmp_path / name))
