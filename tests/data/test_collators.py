"""Batches equal the recorded ones, with two intended differences.

Masks are taken from rows: upstream recomputes `attention_mask` as `input_ids != pad_id`, which hides real tokens of
that id and shows padding of another one. Padding positions count up: upstream pads positions with `pad_id`.
"""

import json
from functools import partial

import pytest
import torch

from internvl.data.collators import (
    collate_rows,
    concat_pad_data_collator,
    dpo_concat_pad_data_collator,
    packed_collate_fn,
    pad_data_collator,
)
from internvl.train.internvl_chat_finetune import len2weight


def to_tensors(row: dict) -> dict:
    return {key: torch.tensor(value) for key, value in row.items()}


def read_recorded_batches(goldens) -> dict:
    return json.loads((goldens / "dataset" / "collator.json").read_text())


def assert_padding_is_a_document(position_ids: torch.Tensor, lengths: list[int]):
    for row, length in zip(position_ids, lengths, strict=True):
        assert row[length:].tolist() == list(range(len(row) - length))


def test_recorded_batches(goldens):
    for case in read_recorded_batches(goldens)["cases"]:
        config = goldens / "dataset" / "expected" / f"{case['dataset_config']}.jsonl"
        samples = [json.loads(line) for line in config.read_text().splitlines()]
        # Without group_by_length, upstream's dataset pads its samples; ours never does.
        lengths = [sum(map(int, samples[i]["attention_mask"])) for i in case["sample_indices"]]
        features = [
            to_tensors({key: samples[i][key][:n] for key in ("input_ids", "labels", "position_ids")})
            | {"pixel_values": torch.full(samples[i]["pixel_values"]["shape"], float(i))}
            | {"image_flags": torch.tensor(samples[i]["image_flags"])}
            for i, n in zip(case["sample_indices"], lengths, strict=True)
        ]
        batch = concat_pad_data_collator(features, **case["collator_args"])
        expected = {key: case["batch"][key]["values"] for key in ("input_ids", "labels", "position_ids", "image_flags")}
        assert batch.keys() == {*expected, "pixel_values"}
        for key in ("input_ids", "labels"):
            padded_length = batch[key].shape[1]
            for row, recorded_row, n in zip(batch[key].tolist(), expected[key], lengths, strict=True):
                assert row[:n] == recorded_row[:n]
                assert set(row[n:]) <= {case["collator_args"].get("pad_id", 0) if key == "input_ids" else -100}
            assert padded_length == case["collator_args"].get("max_item_length", max(lengths))
        for row, recorded_row, n in zip(batch["position_ids"].tolist(), expected["position_ids"], lengths, strict=True):
            assert row[:n] == recorded_row[:n]
        assert_padding_is_a_document(batch["position_ids"], lengths)
        assert batch["image_flags"].tolist() == expected["image_flags"]
        assert list(batch["pixel_values"].shape) == case["batch"]["pixel_values"]["shape"]
        sample_of_tile = [i for i in case["sample_indices"] for _ in samples[i]["image_flags"]]
        assert batch["pixel_values"][:, 0, 0, 0].tolist() == sample_of_tile


def test_recorded_synthetic_batch_with_weights_and_masks(goldens):
    case = read_recorded_batches(goldens)["synthetic_concat"]
    batch = concat_pad_data_collator([to_tensors(row) for row in case["features"]])
    expected = case["expected"]
    for key in ("input_ids", "labels", "pixel_values", "image_flags", "loss_weight"):
        assert batch[key].tolist() == expected[key], key
    assert batch["loss_weight"].dtype == torch.float32
    # Intended: row 0 keeps its real token 0 (upstream hides it), and padding positions count from 0.
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]


def test_recorded_pad_data_collator(goldens):
    case = read_recorded_batches(goldens)["synthetic_pad_data_collator"]
    batch = pad_data_collator([to_tensors(row) for row in case["features"]])
    # Intended: no mask where the rows have none.
    assert {key: value.tolist() for key, value in batch.items()} == {
        key: case["expected"][key] for key in ("input_ids", "labels")
    }


def make_row(length: int, num_tiles: int = 1, **more) -> dict:
    ids = torch.arange(length)
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": ids.clone(),
        "pixel_values": torch.ones(num_tiles, 3, 2, 2),
        "image_flags": torch.ones(num_tiles, dtype=torch.int64),
        **more,
    }


def test_dtypes_and_skipped_samples():
    batch = concat_pad_data_collator(
        [make_row(3, bad_samples=["a"]), make_row(5, 2, bad_samples=[]), make_row(2, bad_samples=["b", "c"])]
    )
    assert batch.pop("bad_samples") == ["a", "b", "c"]
    assert {key: str(value.dtype) for key, value in batch.items()} == {
        "input_ids": "torch.int64",
        "labels": "torch.int64",
        "position_ids": "torch.int64",
        "pixel_values": "torch.float32",
        "image_flags": "torch.int64",
    }
    assert batch["pixel_values"].shape == (4, 3, 2, 2) and batch["input_ids"].shape == (3, 5)


def test_indices_of_rows_for_training():
    first, second = make_row(4), make_row(3, num_tiles=2)
    first["position_ids"], second["labels"] = torch.tensor([0, 1, 0, 1]), torch.tensor([-100, 1, -100])
    batch = collate_rows([first, second], pad_id=9)
    assert batch["cu_seqlens"] == [0, 2, 4, 7, 8]
    # The state of token 1 predicts no loss token: token 2 begins another document.
    assert batch["loss_indices"].tolist() == [0, 2, 4]
    assert not {"image_token_indices", "tile_indices"} & batch.keys(), "the id of image tokens is not known"
    batch = collate_rows([first, second], pad_id=9, image_token_id=2)
    assert batch["image_token_indices"].tolist() == [2, 6] and "tile_indices" not in batch
    second["image_flags"][0] = 0
    batch = collate_rows([first, second], image_token_id=2)
    assert batch["tile_indices"].tolist() == [0, 2]
    text = collate_rows([make_row(2, num_tiles=0)], image_token_id=2)
    assert text["image_token_indices"].tolist() == [] and "tile_indices" not in text


def test_row_longer_than_the_maximum_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="7 tokens .* 5"):
        concat_pad_data_collator([make_row(7), make_row(3)], max_item_length=5)


def test_strings_are_dropped_and_numbers_stacked():
    batch = concat_pad_data_collator([make_row(3, name="a", score=1), make_row(2, name="b", score=2)])
    assert "name" not in batch and batch["score"].tolist() == [1, 2]


def test_sides_of_preference_pairs_are_padded_separately():
    def make_pair(**lengths: int) -> dict:
        tokens = {
            f"{side}_{key}": torch.ones(length, dtype=torch.int64)
            for side, length in lengths.items()
            for key in ("input_ids", "labels")
        }
        return tokens | {"pixel_values": torch.ones(2, 3, 2, 2), "image_flags": torch.ones(2, dtype=torch.int64)}

    pairs = [make_pair(chosen=4, rejected=9), make_pair(chosen=6, rejected=2)]
    batch = dpo_concat_pad_data_collator(pairs, pad_id=5)
    assert batch["chosen_input_ids"].shape == (2, 6) and batch["rejected_labels"].shape == (2, 9)
    assert batch["chosen_input_ids"][0].tolist() == [1] * 4 + [5] * 2
    assert batch["rejected_labels"][1].tolist() == [1] * 2 + [-100] * 7
    assert batch["pixel_values"].shape == (4, 3, 2, 2)


# -- upstream's packed batches -----------------------------------------------------------------------------------------


def read_packed_cases(goldens):
    """Yield (case, its rows) of upstream's recorded packed batches."""
    for file in sorted((goldens / "dataset/packed").glob("*.json")):
        golden = json.loads(file.read_text())
        for case in golden["collated"]:
            items = [golden["items"][i] for i in case["items"]]
            keys = ("input_ids", "labels", "position_ids", "image_flags")
            rows = [to_tensors({key: item[key] for key in keys}) for item in items]
            yield case, [row | {"pixel_values": torch.zeros(len(row["image_flags"]), 3, 2, 2)} for row in rows]


def get_collator_arguments(case: dict) -> dict:
    return {
        "data_collator": concat_pad_data_collator,
        "len2weight": partial(len2weight, loss_reduction=case["loss_reduction"]),
        "max_item_length": case["max_item_length"],
        "micro_num": case["micro_num"],
    }


def test_recorded_packed_batches(goldens):
    num_compared = 0
    for case, rows in read_packed_cases(goldens):
        if "error" in case:
            continue
        arguments = get_collator_arguments(case)
        batch, expected = packed_collate_fn(rows, **arguments), case["batch"]
        assert batch.keys() == expected.keys()
        for key in ("input_ids", "labels", "attention_mask", "image_flags", "statistics"):
            assert batch[key].tolist() == expected[key]["values"], key
            assert str(batch[key].dtype) == f"torch.{expected[key]['dtype']}"
        for weights, recorded_weights in zip(batch["loss_weight"], expected["loss_weight"], strict=True):
            assert weights == pytest.approx(recorded_weights)
        completed = packed_collate_fn(rows, **arguments | {"micro_num": 2})
        assert completed["labels"].shape[0] == 2 and (completed["labels"][1] == -100).all()
        with pytest.raises(NotImplementedError, match="3 rows for a micro-batch of"):
            packed_collate_fn(rows[:1] * 3, **arguments)
        num_compared += 1
    assert num_compared >= 8


def test_packed_rows_must_have_equally_many_documents(goldens):
    """Upstream fails when two rows differ in length, ours in documents."""
    for case, rows in read_packed_cases(goldens):
        if "error" not in case:
            continue
        arguments = get_collator_arguments(case)
        lengths = [len(row["input_ids"]) for row in rows]
        nums_documents = {
            int((row["position_ids"] == 0).sum()) + (length < max(lengths))  # padding is one more
            for row, length in zip(rows, lengths, strict=True)
        }
        if len(nums_documents) == 1:
            batch = packed_collate_fn(rows, **arguments)
            assert batch["attention_mask"].shape == (2, nums_documents.pop() + 1)
        else:
            with pytest.raises(ValueError, match="documents do not fit into one tensor"):
                packed_collate_fn(rows, **arguments)


def test_recorded_weights_by_length(goldens):
    for reduction, pairs in json.loads((goldens / "dataset/len2weight.json").read_text()).items():
        assert [len2weight(n, reduction) for n, _ in pairs] == pytest.approx([weight for _, weight in pairs])
    with pytest.raises(NotImplementedError, match="'mean' is not supported: expected one of token, sample, square"):
        len2weight(3, "mean")
