"""Packed rows: samples concatenated; unusable ones skipped with their reason, never replaced."""

import os
import pickle

import numpy as np
import pytest
import torch
from helpers.samples import are_samples_equal, build_recorded_dataset, make_turns, read_recorded_configs
from PIL import Image
from torch.utils.data import DataLoader

from internvl.arguments.data import DataTrainingArguments
from internvl.data.collators import collate_rows
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.epoch_plan import PlanLayout, plan_epoch
from internvl.planning.packed_dataset import PackedDataset
from internvl.planning.sample_lengths import SINGLE_RANK, measure_dataset
from internvl.train.build_data import TrainingData, split_oversized_samples

TENSORS = ("input_ids", "labels", "position_ids", "pixel_values", "image_flags")


@pytest.fixture
def rows(goldens) -> PackedDataset:
    configs = read_recorded_configs(goldens)
    return PackedDataset(
        [build_recorded_dataset(goldens, configs[name]) for name in ("dyn_thumb_group", "text_group", "bad")]
    )


def test_samples_are_numbered_through_all_datasets(rows):
    sizes = [len(dataset) for dataset in rows.datasets]
    expected = [(dataset, index) for dataset, size in zip(rows.datasets, sizes, strict=True) for index in range(size)]
    assert [rows.locate(sample) for sample in range(len(rows))] == expected
    with pytest.raises(AssertionError, match="25 of 25"):
        rows.locate(25)


def test_row_of_one_sample_is_the_sample(rows):
    for sample in range(len(rows) - 4):
        dataset, index = rows.locate(sample)
        row = rows[3, sample]
        assert row.pop("bad_samples") == [] and row.pop("documents") == [len(row["input_ids"])]
        assert are_samples_equal(row, dataset.get(index, 3))


def test_row_is_its_samples_concatenated(rows):
    ids = (5, 16, -1, 0, 12)
    row = rows[(1, *ids)]
    samples = [rows[1, i] for i in ids if i >= 0]
    for key in TENSORS:
        assert torch.equal(row[key], torch.cat([sample[key] for sample in samples])), key
    starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert starts == [sum(lengths[:k]) for k in range(len(lengths))]
    assert row["documents"] == lengths


def test_skipped_samples_leave_a_reason_and_no_tokens(rows):
    first_unusable = 14 + 7  # its image is missing
    row = rows[0, 2, first_unusable, 3]
    (reason,) = row.pop("bad_samples")
    assert reason.startswith("ds_bad line 1 (") and reason.endswith("does_not_exist.png does not exist")
    without = rows[0, 2, 3]
    assert without.pop("bad_samples") == [] and row.pop("documents") == without.pop("documents")
    assert are_samples_equal(row, without)


@pytest.mark.parametrize("key", [(0, -1), (0,), (0, 21), (0, 21, -1, 23)])
def test_row_without_samples_has_no_loss_tokens(rows, key):
    row = rows[key]
    assert len(row.pop("bad_samples")) == sum(sample in (21, 23) for sample in key[1:])
    assert row.pop("documents") == []
    pad = rows.datasets[0].tokenizer.pad_token_id
    assert row["input_ids"].tolist() == [pad, pad] and row["labels"].tolist() == [-100, -100]
    assert row["position_ids"].tolist() == [0, 1] and row["image_flags"].tolist() == []
    assert row["pixel_values"].shape == (0, 3, 56, 56)
    assert {name: value.dtype for name, value in row.items()} == {name: rows[0, 0][name].dtype for name in row}


def test_only_unusable_samples_are_skipped(make_dataset):
    record = {"image": "nowhere://bucket/a.png", "conversations": make_turns("What?", "A.")}
    dataset = make_dataset(record, meta={"root": ""}, allow_outside_root=True)
    with pytest.raises(ValueError, match="cannot be opened by fsspec: Protocol not known: nowhere"):
        PackedDataset([dataset])[0, 0]


@pytest.mark.parametrize("packed", [False, True])
def test_sample_whose_image_changed_after_measuring_is_skipped_with_its_name(make_dataset, tmp_path, packed):
    """It could be too long for its row. The same for the pieces of a split sample."""
    text = {"conversations": make_turns("What?", "A.")}
    grown = {"image": ["b.jpg", "a.png"], "conversations": make_turns("Which?", "B.")}
    dataset = make_dataset(text, grown, text, max_dynamic_patch=8)
    measured = measure_dataset(dataset, cache_dir=str(tmp_path / "cache"), show_progress=False)
    rows = PackedDataset([dataset], measured.lengths)
    data = TrainingData(rows, measured.lengths, measured.digests, [], None, measured.lost_loss_tokens)
    sample = 1
    if packed:
        flags = {"max_packed_tokens": int(measured.lengths["tokens"][1]) - 1, "num_images_expected": 40}
        args = DataTrainingArguments(use_packed_ds=True, allow_overflow=True, **flags)
        data = split_oversized_samples(data, args, SINGLE_RANK)
        sample = data.dataset.num_unsplit
        assert data.dataset.pieces and len(data.dataset) > 3
    assert data.dataset[0, 0, sample, 2]["bad_samples"] == []
    Image.new("RGB", (28, 84)).save(tmp_path / "a.png")  # 4 tiles instead of 5
    row = data.dataset[0, 0, sample, 2]
    (reason,) = row["bad_samples"]
    assert reason.startswith(f"mine line 2 ({tmp_path}/data.jsonl): it has ") and f"{tmp_path}/a.png changed" in reason
    assert row["documents"] == measured.lengths["tokens"][[0, 2]].tolist()


def test_record_changed_after_measuring_is_skipped_with_its_name(make_dataset, tmp_path):
    """The file is rewritten in place, with the old size and time."""
    dataset = make_dataset(*({"conversations": make_turns("What?", text)} for text in ("A.", "B.", "C.")))
    measured = measure_dataset(dataset, cache_dir=str(tmp_path / "cache"), show_progress=False)
    path = tmp_path / "data.jsonl"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("B.", "X."))
    os.utime(path, ns=times)
    row = PackedDataset([dataset], measured.lengths)[0, 0, 1, 2]
    (reason,) = row["bad_samples"]
    assert reason.startswith(f"mine line 2 ({path}): line 2 is not what it was when the run opened {path}")
    assert row["documents"] == measured.lengths["tokens"][[0, 2]].tolist()
    again = measure_dataset(
        LazySupervisedDataset("mine", {"root": "", "annotation": str(path)}, dataset.tokenizer, 4, dataset.data_args),
        cache_dir=str(tmp_path / "cache"),
        show_progress=False,
    )
    assert (again.digests != measured.digests).tolist() == [False, True, False], "a run that resumes sees the change"


def test_dataset_can_be_pickled(rows):
    copy = pickle.loads(pickle.dumps(rows))
    assert are_samples_equal({key: copy[0, 5][key] for key in TENSORS}, {key: rows[0, 5][key] for key in TENSORS})


LAYOUTS = [{}, {"group_by_length": True}, {"packed": True, "max_tokens": 420, "max_tiles": 14}]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_of_an_epoch(rows, tmp_path, layout):
    """They hold every usable sample once, with any number of workers."""
    measured = [measure_dataset(dataset, cache_dir=str(tmp_path), show_progress=False) for dataset in rows.datasets]
    lengths = np.concatenate([measurements.lengths for measurements in measured])
    plan = plan_epoch(lengths, PlanLayout(0, world_size=2, micro_batch_size=2, gradient_accumulation=2, **layout), 1)
    keys = [[(1, *plan.get_row_samples(row)) for row in batch] for batch in plan.steps.reshape(-1, 2).tolist()]

    def batches(workers: int) -> list[dict]:
        return list(DataLoader(rows, batch_sampler=keys, collate_fn=collate_rows, num_workers=workers))

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(plan) * 4
    for one, other in zip(alone, shared, strict=True):
        assert one.pop("bad_samples") == other.pop("bad_samples") == []
        assert one.pop("documents") == other.pop("documents")
        assert one.pop("cu_seqlens") == other.pop("cu_seqlens") and are_samples_equal(one, other)
    assert sum(int((batch["labels"] != -100).sum()) for batch in alone) == lengths["loss_tokens"].sum() > 0
    assert sum(len(batch["pixel_values"]) for batch in alone) == lengths["tiles"].sum()
