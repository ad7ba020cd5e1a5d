"""Meta files and their entries: what is taken, and in which sentence the rest is refused."""

import pytest
from helpers.samples import ANSWER, QUESTION

from internvl.data.schema import load_meta
from internvl.data.supervised_dataset import LazySupervisedDataset


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "cannot be opened: No such file"),
        ("{", "cannot be used: Expecting"),
        ("[]", "must look like"),
        ("{}", "must look like"),
        ('{"a": 1}', "must look like"),
        ('{"a": {}, "a": {}}', "'a' is used twice"),
    ],
)
def test_meta_files_that_cannot_be_used(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=rf"meta\.json.*{reason}"):
        load_meta(str(tmp_path / "meta.json"))


def test_recorded_meta_file(goldens):
    assert list(load_meta(str(goldens / "dataset" / "meta.json"))) == ["ds_main", "ds_text"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"repeat_time": 0}, "repeat_time must be a positive number, not 0"),
        ({"repeat_time": "2"}, "repeat_time must be a positive number, not '2'"),
        ({"repeat_time": 0.1}, "repeat_time 0.1 of the 1 records .* leaves no sample"),
        ({"data_augment": "no"}, "data_augment must be true or false"),
        ({"max_dynamic_patch": 1.5}, "max_dynamic_patch must be a positive whole number"),
        ({"weight": 3}, "'weight' is not known; known are root, annotation"),
        ({"annotation": "/absent.jsonl"}, "/absent.jsonl does not exist"),
        ({"root": None}, "root must be a path"),
    ],
)
def test_meta_entries_that_cannot_be_used(make, change, reason):
    with pytest.raises(ValueError, match=reason):
        make({"conversations": [QUESTION, ANSWER]}, meta=change)


def test_missing_keys_are_named(make):
    dataset = make({"conversations": [QUESTION, ANSWER]})
    with pytest.raises(ValueError, match="data set x: the key 'root' is missing; the key 'annotation' is missing"):
        LazySupervisedDataset("x", {}, dataset.tokenizer, 4, dataset.data_args)
