"""Rows: samples laid end to end; unusable ones left out, told of, and never replaced."""

import pickle

import numpy as np
import pytest
import torch
from helpers.samples import recorded_configs, recorded_dataset, samples_equal, turns
from torch.utils.data import DataLoader

from internvl.data.collators import row_collator
from internvl.planning.epoch_plan import PlanLayout, SampleLengths, plan_epoch
from internvl.planning.packed_dataset import PackedDataset
from internvl.planning.sample_lengths import measure_dataset

TENSORS = ("input_ids", "labels", "position_ids", "pixel_values", "image_flags")


@pytest.fixture
def rows(goldens) -> PackedDataset:
    configs = recorded_configs(goldens)
    return PackedDataset(
        [recorded_dataset(goldens, configs[name]) for name in ("dyn_thumb_group", "text_group", "bad")]
    )


def test_samples_are_numbered_over_all_data_sets(rows):
    sizes = [len(dataset) for dataset in rows.datasets]
    expected = [(dataset, index) for dataset, size in zip(rows.datasets, sizes, strict=True) for index in range(size)]
    assert [rows.locate(sample) for sample in range(len(rows))] == expected
    with pytest.raises(AssertionError, match="25 of 25"):
        rows.locate(25)


def test_a_row_of_one_is_the_sample(rows):
    for sample in range(len(rows) - 4):
        dataset, index = rows.locate(sample)
        row = rows[3, sample]
        assert row.pop("bad_samples") == [] and row.pop("documents") == [len(row["input_ids"])]
        assert samples_equal(row, dataset.get(index, 3))


def test_a_row_is_its_samples_end_to_end(rows):
    ids = (5, 16, -1, 0, 12)
    row = rows[(1, *ids)]
    samples = [rows[1, i] for i in ids if i >= 0]
    for key in TENSORS:
        assert torch.equal(row[key], torch.cat([sample[key] for sample in samples])), key
    starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert starts == [sum(lengths[:k]) for k in range(len(lengths))]
    assert row["documents"] == lengths


def test_bad_samples_leave_a_sentence_and_no_token(rows):
    first_bad = 14 + 7  # its image is missing
    row = rows[0, 2, first_bad, 3]
    (sentence,) = row.pop("bad_samples")
    assert sentence.startswith("ds_bad line 1 (") and sentence.endswith("does_not_exist.png does not exist")
    without = rows[0, 2, 3]
    assert without.pop("bad_samples") == [] and row.pop("documents") == without.pop("documents")
    assert samples_equal(row, without)


@pytest.mark.parametrize("key", [(0, -1), (0,), (0, 21), (0, 21, -1, 23)])
def test_nothing_left_is_a_row_that_trains_nothing(rows, key):
    row = rows[key]
    assert len(row.pop("bad_samples")) == sum(sample in (21, 23) for sample in key[1:])
    assert row.pop("documents") == []
    pad = rows.datasets[0].tokenizer.pad_token_id
    assert row["input_ids"].tolist() == [pad, pad] and row["labels"].tolist() == [-100, -100]
    assert row["position_ids"].tolist() == [0, 1] and row["image_flags"].tolist() == []
    assert row["pixel_values"].shape == (0, 3, 56, 56)
    assert {name: value.dtype for name, value in row.items()} == {name: rows[0, 0][name].dtype for name in row}


def test_only_bad_samples_are_caught(make):
    record = {"image": "nowhere://bucket/a.png", "conversations": turns("What?", "A.")}
    dataset = make(record, meta={"root": ""}, allow_outside_root=True)
    with pytest.raises(ValueError, match="cannot be opened by fsspec: Protocol not known: nowhere"):
        PackedDataset([dataset])[0, 0]


def test_pickles_whole(rows):
    copy = pickle.loads(pickle.dumps(rows))
    assert samples_equal({key: copy[0, 5][key] for key in TENSORS}, {key: rows[0, 5][key] for key in TENSORS})


LAYOUTS = [{}, {"group_by_length": True}, {"packed": True, "max_tokens": 420, "max_tiles": 14}]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_epoch_from_lengths_to_batches(rows, tmp_path, layout):
    """Every usable sample is in the batches once, the same ones for any number of workers."""
    measured = [measure_dataset(dataset, cache_dir=str(tmp_path), progress=False).lengths for dataset in rows.datasets]
    lengths = SampleLengths(*(np.concatenate(parts) for parts in zip(*measured, strict=True)))
    plan = plan_epoch(lengths, PlanLayout(0, world_size=2, micro_batch=2, accumulation=2, **layout), 1)
    keys = [[(1, *plan.row(row)) for row in batch] for batch in plan.steps.reshape(-1, 2).tolist()]

    def batches(workers: int) -> list[dict]:
        return list(DataLoader(rows, batch_sampler=keys, collate_fn=row_collator, num_workers=workers))

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(plan) * 4
    for one, other in zip(alone, shared, strict=True):
        assert one.pop("bad_samples") == other.pop("bad_samples") == []
        assert one.pop("documents") == other.pop("documents")
        assert one.pop("cu_seqlens") == other.pop("cu_seqlens") and samples_equal(one, other)
    assert sum(int((batch["labels"] != -100).sum()) for batch in alone) == lengths.trained.sum() > 0
    assert sum(len(batch["pixel_values"]) for batch in alone) == lengths.tiles.sum()
