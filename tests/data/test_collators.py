"""Batches as recorded, with two differences on purpose: masks are carried, not guessed; padding positions count up.

Upstream recomputes `attention_mask` as `input_ids != pad_id`, which hides real tokens of that id and shows padding of
another one, and pads positions with `pad_id`.
"""

import json
from functools import partial

import pytest
import torch

from internvl.data.collators import (
    concat_pad_data_collator,
    dpo_concat_pad_data_collator,
    packed_collate_fn,
    pad_data_collator,
)
from internvl.train.internvl_chat_finetune import len2weight


def tensors(rows: dict) -> dict:
    return {key: torch.tensor(value) for key, value in rows.items()}


def recorded(goldens) -> dict:
    return json.loads((goldens / "dataset" / "collator.json").read_text())


def assert_padding_is_a_document(positions: torch.Tensor, lengths: list[int]):
    for row, length in zip(positions, lengths, strict=True):
        assert row[length:].tolist() == list(range(len(row) - length))


def test_recorded_batches(goldens):
    for case in recorded(goldens)["cases"]:
        config = goldens / "dataset" / "expected" / f"{case['dataset_config']}.jsonl"
        items = [json.loads(line) for line in config.read_text().splitlines()]
        # Upstream's data set pads to the end when it does not group by length; ours never does.
        lengths = [sum(map(int, items[i]["attention_mask"])) for i in case["sample_indices"]]
        features = [
            tensors({key: items[i][key][:n] for key in ("input_ids", "labels", "position_ids")})
            | {"pixel_values": torch.full(items[i]["pixel_values"]["shape"], float(i))}
            | {"image_flags": torch.tensor(items[i]["image_flags"])}
            for i, n in zip(case["sample_indices"], lengths, strict=True)
        ]
        batch = concat_pad_data_collator(features, **case["collator_args"])
        expected = {key: case["batch"][key]["values"] for key in ("input_ids", "labels", "position_ids", "image_flags")}
        assert batch.keys() == {*expected, "pixel_values"}
        for key in ("input_ids", "labels"):
            width = batch[key].shape[1]
            for row, other, n in zip(batch[key].tolist(), expected[key], lengths, strict=True):
                assert row[:n] == other[:n]
                assert set(row[n:]) <= {case["collator_args"].get("pad_id", 0) if key == "input_ids" else -100}
            assert width == case["collator_args"].get("max_item_length", max(lengths))
        for row, other, n in zip(batch["position_ids"].tolist(), expected["position_ids"], lengths, strict=True):
            assert row[:n] == other[:n]
        assert_padding_is_a_document(batch["position_ids"], lengths)
        assert batch["image_flags"].tolist() == expected["image_flags"]
        assert list(batch["pixel_values"].shape) == case["batch"]["pixel_values"]["shape"]
        order = [i for i in case["sample_indices"] for _ in items[i]["image_flags"]]
        assert batch["pixel_values"][:, 0, 0, 0].tolist() == order


def test_recorded_synthetic_batch_with_weights_and_masks(goldens):
    case = recorded(goldens)["synthetic_concat"]
    batch = concat_pad_data_collator([tensors(row) for row in case["features"]])
    expected = case["expected"]
    for key in ("input_ids", "labels", "pixel_values", "image_flags", "loss_weight"):
        assert batch[key].tolist() == expected[key], key
    assert batch["loss_weight"].dtype == torch.float32
    # On purpose: row 0 keeps its real token 0 (upstream hides it), and padding counts on from 0.
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]


def test_recorded_plain_collator(goldens):
    case = recorded(goldens)["synthetic_pad_data_collator"]
    batch = pad_data_collator([tensors(row) for row in case["features"]])
    # On purpose: no mask where the rows have none.
    assert {key: value.tolist() for key, value in batch.items()} == {
        key: case["expected"][key] for key in ("input_ids", "labels")
    }


def row(length: int, tiles: int = 1, **more) -> dict:
    ids = torch.arange(length)
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": ids.clone(),
        "pixel_values": torch.ones(tiles, 3, 2, 2),
        "image_flags": torch.ones(tiles, dtype=torch.int64),
        **more,
    }


def test_types_and_bad_samples():
    batch = concat_pad_data_collator(
        [row(3, bad_samples=["a"]), row(5, 2, bad_samples=[]), row(2, bad_samples=["b", "c"])]
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


def test_a_row_longer_than_asked_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="7 tokens .* 5"):
        concat_pad_data_collator([row(7), row(3)], max_item_length=5)


def test_strings_are_dropped_and_numbers_stacked():
    batch = concat_pad_data_collator([row(3, name="a", score=1), row(2, name="b", score=2)])
    assert "name" not in batch and batch["score"].tolist() == [1, 2]


def test_preference_pairs_are_padded_side_by_side():
    def pair(chosen: int, rejected: int) -> dict:
        sides = {"chosen": chosen, "rejected": rejected}
        made = {
            f"{side}_{key}": torch.ones(n, dtype=torch.int64)
            for side, n in sides.items()
            for key in ("input_ids", "labels")
        }
        return made | {"pixel_values": torch.ones(2, 3, 2, 2), "image_flags": torch.ones(2, dtype=torch.int64)}

    batch = dpo_concat_pad_data_collator([pair(4, 9), pair(6, 2)], pad_id=5)
    assert batch["chosen_input_ids"].shape == (2, 6) and batch["rejected_labels"].shape == (2, 9)
    assert batch["chosen_input_ids"][0].tolist() == [1] * 4 + [5] * 2
    assert batch["rejected_labels"][1].tolist() == [1] * 2 + [-100] * 7
    assert batch["pixel_values"].shape == (4, 3, 2, 2)


def test_recorded_packed_batches(goldens):
    """Upstream's batches of packed rows: bounds, weights and counts as recorded; two rows of as many documents, too."""
    seen = 0
    for file in sorted((goldens / "dataset/packed").glob("*.json")):
        golden = json.loads(file.read_text())
        for case in golden["collated"]:
            rows = [
                tensors(
                    {key: golden["items"][i][key] for key in ("input_ids", "labels", "position_ids", "image_flags")}
                )
                | {"pixel_values": torch.zeros(len(golden["items"][i]["image_flags"]), 3, 2, 2)}
                for i in case["items"]
            ]
            arguments = {
                "data_collator": concat_pad_data_collator,
                "len2weight": partial(len2weight, loss_reduction=case["loss_reduction"]),
                "max_item_length": case["max_item_length"],
                "micro_num": case["micro_num"],
            }
            if "error" in case:  # upstream's fails whenever rows differ in length, ours when they do in documents
                lengths = [len(row["input_ids"]) for row in rows]
                documents = {
                    int((row["position_ids"] == 0).sum()) + (length < max(lengths))  # padding is one more
                    for row, length in zip(rows, lengths, strict=True)
                }
                if len(documents) == 1:
                    assert packed_collate_fn(rows, **arguments)["attention_mask"].shape == (2, documents.pop() + 1)
                    continue
                with pytest.raises(ValueError, match="documents do not fit into one tensor"):
                    packed_collate_fn(rows, **arguments)
                continue
            batch, expected, seen = packed_collate_fn(rows, **arguments), case["batch"], seen + 1
            assert batch.keys() == expected.keys()
            for key in ("input_ids", "labels", "attention_mask", "image_flags", "statistics"):
                assert batch[key].tolist() == expected[key]["values"], (file.name, key)
                assert str(batch[key].dtype) == f"torch.{expected[key]['dtype']}"
            for ours, theirs in zip(batch["loss_weight"], expected["loss_weight"], strict=True):
                assert ours == pytest.approx(theirs)
            filled = packed_collate_fn(rows, **arguments | {"micro_num": 2})
            assert filled["labels"].shape[0] == 2 and (filled["labels"][1] == -100).all()
            with pytest.raises(NotImplementedError, match="3 rows for a micro-batch of"):
                packed_collate_fn(rows[:1] * 3, **arguments)
    assert seen >= 8


def test_weights_by_length_as_recorded(goldens):
    for reduction, pairs in json.loads((goldens / "dataset/len2weight.json").read_text()).items():
        assert [len2weight(n, reduction) for n, _ in pairs] == pytest.approx([weight for _, weight in pairs])
    with pytest.raises(NotImplementedError, match="'mean' is not one of token, sample, square"):
        len2weight(3, "mean")
