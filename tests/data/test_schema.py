"""Invalid meta files and entries are reported."""

import pytest
from helpers.samples import ANSWER, QUESTION

from internvl.data.schema import load_meta
from internvl.data.supervised_dataset import LazySupervisedDataset


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "cannot be opened: No such file"),
        ("{", "is invalid: Expecting"),
        ("[]", "is invalid: expected"),
        ("{}", "is invalid: expected"),
        ('{"a": 1}', "is invalid: expected"),
        ('{"a": {}, "a": {}}', "'a' is used twice"),
    ],
)
def test_invalid_meta_files_are_reported(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=rf"meta\.json.*{reason}"):
        load_meta(str(tmp_path / "meta.json"))


def test_recorded_meta_file(goldens):
    assert list(load_meta(str(goldens / "dataset" / "meta.json"))) == ["ds_main", "ds_text"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"repeat_time": 0}, "repeat_time must be a positive number, got 0"),
        ({"repeat_time": "2"}, "repeat_time must be a positive number, got '2'"),
        ({"repeat_time": 0.1}, "repeat_time 0.1 of the 1 records .* leaves no sample"),
        ({"data_augment": "no"}, "data_augment must be true or false"),
        ({"max_dynamic_patch": 1.5}, "max_dynamic_patch must be a positive integer"),
        ({"weight": 3}, "'weight' is not supported; supported are root, annotation"),
        ({"annotation": "/absent.jsonl"}, "/absent.jsonl does not exist"),
        ({"root": None}, "root must be a path"),
    ],
)
def test_invalid_meta_entries_are_reported(make_dataset, change, reason):
    with pytest.raises(ValueError, match=reason):
        make_dataset({"conversations": [QUESTION, ANSWER]}, meta=change)


def test_missing_keys_are_reported(make_dataset):
    dataset = make_dataset({"conversations": [QUESTION, ANSWER]})
    with pytest.raises(ValueError, match="dataset x: the key 'root' is missing; the key 'annotation' is missing"):
        LazySupervisedDataset("x", {}, dataset.tokenizer, 4, dataset.data_args)
