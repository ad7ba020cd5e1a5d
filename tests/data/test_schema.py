"""Invalid meta files and entries are reported."""

import json
import os
import time
from pathlib import Path

import pytest
from helpers.samples import ANSWER, QUESTION

from internvl.constants import MAX_TILES_PER_IMAGE, shorten
from internvl.data.schema import load_meta
from internvl.data.supervised_dataset import LazySupervisedDataset

FAULTS = Path(__file__).parent / "faults"


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "cannot be opened: No such file"),
        ("{", "is invalid: Expecting"),
        ("[]", "is invalid: expected"),
        ("{}", "is invalid: expected"),
        ('{"a": 1}', "is invalid: expected"),
        ('{"a": {}, "a": {}}', "'a' is used twice"),
        ('{"a": {"root": "x", "root": "y"}}', "'root' is used twice"),
        ('{"a": {}, "b": []}', "is invalid: expected .* got {'a': {}, 'b': \\[\\]}"),
        ('"x"', "is invalid: expected .* got 'x'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"": {}}', "the name '' must have 1 to 255"),
        ('{"\\ud83d": {}}', r"the name '\\ud83d' must have 1 to 255 printable"),
        ('{"a\\nb": {}}', r"the name 'a\\nb' must have 1 to 255 printable"),
        (json.dumps({"a" * 2_000_000: {}}), "the name 'aaa.*aaa' must have"),
        (f'{{"a": {"1" * 5000}}}', "is invalid: Exceeds the limit"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "is a pointer of Git LFS"),
        (b"\xff\xfe{\x00}\x00", "is invalid: 'utf-8' codec can't decode"),
    ],
)
def test_invalid_meta_files_are_reported(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "meta.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"meta\.json.*{reason}") as caught:
        load_meta(str(tmp_path / "meta.json"))
    assert len(str(caught.value)) < 600


def test_meta_file_that_is_no_file_is_reported(tmp_path):
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "fifo.json")
    for name, reason in (("folder.json", "Is a directory"), ("fifo.json", "is a FIFO, not a regular file")):
        with pytest.raises(ValueError, match=f"{name} cannot be opened: .*{reason}"):
            load_meta(str(tmp_path / name))


def test_meta_file_may_start_with_a_byte_order_mark():
    assert load_meta(str(FAULTS / "F22_meta_bom.json")) == {"x": {"root": "img", "annotation": "F02_images_key.jsonl"}}


def test_many_names_are_read_in_linear_time(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps({f"name {number}": {} for number in range(100_000)}))
    start = time.perf_counter()
    assert len(load_meta(str(tmp_path / "meta.json"))) == 100_000
    assert time.perf_counter() - start < 5


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
        ({"repeat_time": True}, "repeat_time must be a positive number, got True"),
        ({"repeat_time": -1}, "repeat_time must be a positive number, got -1"),
        ({"repeat_time": float("inf")}, "repeat_time must be a positive number, got inf"),
        ({"repeat_time": float("nan")}, "repeat_time must be a positive number, got nan"),
        ({"repeat_time": 1e12}, r"repeat_time 1000000000000.0 of the 1 records .* gives more than 268,435,456 samples"),
        ({"repeat_time": 1e300}, r"repeat_time 1e\+300 of the 1 records .* gives more than"),
        ({"repeat_time": 10**400}, r"repeat_time 1000.* of the 1 records .* gives more than"),
        ({"repeat_time": 1e-300}, "leaves no sample"),
        ({"max_dynamic_patch": 10**6}, f"a positive integer up to {MAX_TILES_PER_IMAGE}, got 1000000"),
        ({"max_dynamic_patch": True}, "a positive integer up to .* got True"),
        ({"annotation": ["x.jsonl"]}, r"annotation must be a path, got \['x.jsonl'\]"),
        ({"annotation": "x\0.jsonl"}, r"annotation must be a path, got 'x\\x00.jsonl'"),
        ({"annotation": "\ud800.jsonl"}, r"annotation must be a path, got '\\ud800.jsonl'"),
        ({"annotation": "x" * 10**6}, "annotation must be a path, got 'xxx.*xxx'"),
        ({"root": "x" * 10**6}, "root must be a path"),
        ({"data_augment": 1}, "data_augment must be true or false, got 1"),
        ({f"key {n}": 1 for n in range(1000)}, "'key 2' is not supported"),
        ({"weight": 3}, "'weight' is not supported; supported are root, annotation"),
        ({"annotation": "/absent.jsonl"}, "/absent.jsonl does not exist"),
        ({"root": None}, "root must be a path"),
    ],
)
def test_invalid_meta_entries_are_reported(make_dataset, change, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        make_dataset({"conversations": [QUESTION, ANSWER]}, meta=change)
    assert len(str(caught.value)) < 600


def test_missing_keys_are_reported(make_dataset):
    dataset = make_dataset({"conversations": [QUESTION, ANSWER]})
    with pytest.raises(ValueError, match="dataset x: the key 'root' is missing; the key 'annotation' is missing"):
        LazySupervisedDataset("x", {}, dataset.tokenizer, 4, dataset.data_args)


def test_infinite_repeat_time_of_a_file_is_reported(make_dataset):
    entry = load_meta(str(FAULTS / "F23_meta_inf.json"))["x"]
    with pytest.raises(ValueError, match="repeat_time must be a positive number, got inf"):
        make_dataset({"conversations": [QUESTION, ANSWER]}, meta={"repeat_time": entry["repeat_time"]})


def nest(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, ["x" * 10**7] * 100, {"x" * 1000: 1}, nest(100_000), {"a": nest(900)}, 10**300, "\ud800" * 500],
)
def test_any_value_is_shortened(value):
    text = shorten(value)
    assert len(text) <= 100 and text.isprintable()
