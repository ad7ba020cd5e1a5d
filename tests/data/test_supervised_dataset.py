"""Samples as recorded from upstream, and what becomes of data that cannot be used.

Differences from upstream, on purpose: samples are not padded (it pads to `model_max_length` unless it groups by
length), and a record that it replaced by a random other one raises BadSample or, where it can be understood, is used.
"""

import hashlib
import json
import pickle

import numpy as np
import PIL
import pytest
import torch
import torchvision
from helpers.samples import (
    ANSWER,
    BAD,
    QUESTION,
    recorded_configs,
    recorded_dataset,
    recorded_items,
    samples_equal,
    turns,
)

from internvl.constants import UnusableSample
from internvl.data.supervised_dataset import LazySupervisedDataset

SAME_ARITHMETIC = PIL.__version__ == "13.0.0" and torchvision.__version__.startswith("0.29.1")
GREY_LEVELS = 0.04  # two steps of 1 / 255, normalised: where another Pillow rounds otherwise while it resizes


def assert_same_sample(sample: dict, item: dict, where: str):
    length = sum(map(int, item["attention_mask"]))
    for key in ("input_ids", "labels", "position_ids"):
        assert sample[key].dtype == torch.int64
        assert sample[key].tolist() == item[key][:length], f"{where} {key}"
    assert sample["image_flags"].tolist() == item["image_flags"], where
    pixels, digest = sample["pixel_values"], item["pixel_values"]
    assert list(pixels.shape) == digest["shape"] and pixels.dtype == torch.float32, where
    if SAME_ARITHMETIC:
        assert hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest() == digest["sha256"], where
    else:
        torch.testing.assert_close(pixels.flatten()[:8], torch.tensor(digest["first8"]), atol=GREY_LEVELS, rtol=0)
        assert abs(pixels.mean().item() - digest["mean"]) < 1e-3, where


def test_recorded_samples(goldens):
    seen = strays = 0
    for name, config in recorded_configs(goldens).items():
        dataset = recorded_dataset(goldens, config)
        items = recorded_items(goldens, name)
        assert len(dataset) == config["len"] == len(items)
        for index, item in enumerate(items):
            where = f"{name} {index} (id {item['id']})"
            if item["replaced_by_id"] is not None:
                continue  # see test_what_upstream_replaced
            if all(label == -100 for label in item["labels"]):
                with pytest.raises(UnusableSample, match="no answer to train on"):
                    dataset.get(index, 0)
                continue
            sample = dataset[index]
            if stray := has_stray_placeholder(dataset.records[index]):
                remove_stray_placeholder(item, sample)
            assert_same_sample(sample, item, where)
            seen += 1
            strays += stray
    assert seen > 50 and strays > 0


def has_stray_placeholder(record: dict) -> bool:
    """Upstream puts a literal `<image>` line into a system turn that has none, although the question has its own."""
    first, *others = record["conversations"]
    asked = any("<image>" in turn["value"] for turn in others if turn["from"] == "human")
    single = isinstance(record.get("image"), str)
    return asked and single and first["from"] == "system" and "<image>" not in first["value"]


def remove_stray_placeholder(item: dict, sample: dict):
    """Take upstream's extra tokens out of a recorded item: what lies between the common start and the common end."""
    length = sum(map(int, item["attention_mask"]))
    ours, theirs = sample["input_ids"].tolist(), item["input_ids"][:length]
    extra = length - len(ours)
    assert 0 < extra <= 8, "a few tokens for one line"
    start = next(i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
    for key in ("input_ids", "labels"):
        item[key] = item[key][:start] + item[key][start + extra : length]
    item["attention_mask"] = item["attention_mask"][extra:length]
    item["position_ids"] = item["position_ids"][: len(ours)]


def test_what_upstream_replaced(goldens):
    """Missing files and wrong counts are reported. System turns, which upstream's older templates refuse, are used; so
    is a record whose first turn is the system's and whose question lacks the placeholder: it goes to the first human
    turn."""
    outcomes = {}
    for name, config in recorded_configs(goldens).items():
        dataset = recorded_dataset(goldens, config)
        for index, item in enumerate(recorded_items(goldens, name)):
            if item["replaced_by_id"] is None:
                continue
            record = dataset.records[index]
            try:
                sample = dataset.get(index, 0)
            except UnusableSample as reason:
                outcomes[str(item["id"])] = str(reason)
                continue
            system, human = record["conversations"][:2]
            assert system["from"] == "system", f"{name} {index}: only records with a system turn may pass"
            text = dataset.tokenizer.decode(sample["input_ids"])
            assert system["value"].strip() in text
            if "image" in record:
                assert text.index("<img>") > text.index(system["value"].strip())
    assert outcomes.keys() >= {"bad_missing_file", "bad_count"} and "bad_system_first" not in outcomes
    assert "does_not_exist.png does not exist" in outcomes["bad_missing_file"]
    assert "1 <image>" in outcomes["bad_count"] and "2 images" in outcomes["bad_count"]


def test_recorded_repeat_times(goldens):
    """On purpose, a fraction is a random part, where upstream takes the first records, or refuses (1.5)."""
    config = recorded_configs(goldens)["dyn_thumb"]
    for row in json.loads((goldens / "dataset" / "configs.json").read_text())["repeat_time"]:
        dataset = recorded_dataset(goldens, config, repeat_time=row["repeat_time"])
        assert len(dataset) == (int(14 * row["repeat_time"]) if "error" in row else len(row["ids"]))
        if row["repeat_time"] == int(row["repeat_time"]):
            assert [dataset._record(i)["id"] for i in range(len(dataset))] == row["ids"]
    assert len(recorded_dataset(goldens, config, repeat_time=2.0)) == 28


# -- own data ----------------------------------------------------------------------------------------------------------


def text_of(dataset: LazySupervisedDataset, index: int = 0) -> str:
    """The sample's text, image tokens written as [n]."""
    text = dataset.tokenizer.decode(dataset.get(index, 0)["input_ids"])
    for n in range(100, 0, -1):
        text = text.replace("<img>" + "<IMG_CONTEXT>" * n + "</img>", f"[{n}]")
    return text


@pytest.mark.parametrize("repeat_time", [0.02, 0.3, 0.5, 0.999, 1, 1.0, 1.7, 2, 2.5, 7.25])
def test_repeat_time_is_whole_copies_and_a_random_part(make, repeat_time):
    records = [{"id": n, "conversations": turns("What?", "A.")} for n in range(60)]

    def ids(**changes) -> list[int]:
        dataset = make(*records, meta={"repeat_time": repeat_time}, **changes)
        assert [int(dataset.describe(i).split()[2]) - 1 for i in range(len(dataset))] == list(dataset.order)
        return [dataset._record(i)["id"] for i in range(len(dataset))]

    copies, part = divmod(int(60 * repeat_time), 60)
    drawn = ids()
    assert len(drawn) == 60 * copies + part
    assert drawn[: 60 * copies] == list(range(60)) * copies
    assert drawn[60 * copies :] == sorted(set(drawn[60 * copies :])), "without replacement, in the order of the file"
    assert drawn == ids(), "decided by the seed"
    if 1 < part < 59:
        assert drawn != ids(seed=1) and drawn[60 * copies :] != list(range(part)), "at random"


def test_every_record_is_as_likely_as_another_to_be_in_the_part(make):
    records = [{"conversations": turns("What?", "A.")}] * 10
    drawn = [make(*records, meta={"repeat_time": 0.3}, seed=seed).order for seed in range(300)]
    counts = np.bincount(np.concatenate(drawn), minlength=10)
    assert np.abs(counts - 90).max() < 4 * np.sqrt(300 * 0.3 * 0.7), counts


def test_missing_placeholders_go_to_the_first_human_turn(make):
    system = {"from": "system", "value": "Be brief."}
    dataset = make(
        {"image": "a.png", "conversations": [system, *turns("What?", "A.")]},
        {"image": ["a.png", "b.jpg"], "conversations": [system, *turns("What?", "A.")]},
        {"image": "a.png", "conversations": turns("Hello.", "Hello.", "Now <image> this?", "B.")},
        {"image": ["a.png"], "conversations": turns("What?", "A.")},
        max_dynamic_patch=1,
    )
    assert "user\n[4]\nWhat?" in text_of(dataset, 0)
    assert "user\n[4]\n[4]\nWhat?" in text_of(dataset, 1)
    assert "user\nHello." in text_of(dataset, 2) and "Now [4] this?" in text_of(dataset, 2), "the writer's place counts"
    assert "user\n[4]\nWhat?" in text_of(dataset, 3)


def test_surplus_placeholders_stay_text(make):
    dataset = make({"image": "a.png", "conversations": turns("<image> and <image>?", "A.")}, max_dynamic_patch=1)
    assert "[4] and <image>?" in text_of(dataset)


def test_null_and_empty_media_mean_text(make):
    records = [{"image": value, "video": value, "conversations": turns("<image>?", "A.")} for value in (None, "", [])]
    dataset = make(*records)
    for index in range(3):
        sample = dataset.get(index, 0)
        assert sample["image_flags"].tolist() == [] and sample["pixel_values"].shape == (0, 3, 28, 28)
        assert "<image>?" in text_of(dataset, index)


def test_images_of_a_record_share_the_budget_of_tiles(make):
    images = ["a.png"] * 3
    dataset = make({"image": images, "conversations": turns("Which?", "A.")}, max_dynamic_patch=7)
    assert len(dataset.get(0, 0)["image_flags"]) == 3 * (2 + 1), "7 // 3 = 2 tiles each, and a thumbnail each"
    dataset = make({"image": images, "conversations": turns("Which?", "A.")}, meta={"max_dynamic_patch": 2})
    assert len(dataset.get(0, 0)["image_flags"]) == 3, "the meta entry's max_dynamic_patch counts, not the flag's 12"


@pytest.mark.parametrize("question", ["<video>\nWhat?", "<video>What?", "What?"])
def test_videos_become_frames(make, question):
    record = {"video": "film", "conversations": [{"from": "system", "value": "S"}, *turns(question, "A.")]}
    dataset = make(record, min_num_frame=3, max_num_frame=3)
    sample = dataset.get(0, 0)
    assert sample["image_flags"].tolist() == [1, 1, 1]
    assert "user\nFrame-1: [4]\nFrame-2: [4]\nFrame-3: [4]\nWhat?" in text_of(dataset)


def test_index_epoch_and_seed_decide_a_sample(make):
    video = {"video": "film", "conversations": turns("What?", "A.")}
    picture = {"image": "a.png", "conversations": turns("What?", "A.")}

    def fresh(seed=0):
        return make(video, picture, picture, seed=seed, meta={"data_augment": True}, min_num_frame=2, max_num_frame=9)

    dataset, copy = fresh(), pickle.loads(pickle.dumps(fresh()))
    backwards = {(i, e): copy.get(i, e) for e in (2, 1, 0) for i in (2, 1, 0)}
    for (i, e), sample in backwards.items():
        assert samples_equal(sample, dataset.get(i, e)), "in another order, in another process: the same"
    assert not samples_equal(backwards[1, 0], backwards[1, 1]), "JPEG quality changes with the epoch"
    assert not samples_equal(backwards[1, 0], backwards[2, 0]), "and with the index"
    assert not samples_equal(backwards[1, 0], fresh(seed=1).get(1, 0)), "and with the seed"
    assert len(backwards[0, 0]["image_flags"]) == len(backwards[0, 1]["image_flags"]), "the length does not"


def test_same_samples_whatever_the_number_of_workers(make):
    picture = {"image": "b.jpg", "conversations": turns("What?", "A.")}
    dataset = make(*[picture] * 12, meta={"data_augment": True})
    alone = list(torch.utils.data.DataLoader(dataset, batch_size=None, shuffle=False))
    shared = list(torch.utils.data.DataLoader(dataset, batch_size=None, shuffle=False, num_workers=2))
    assert len(alone) == len(shared) == 12 and all(map(samples_equal, alone, shared))


@pytest.mark.parametrize("case", BAD)
def test_records_that_cannot_be_used_say_why(make, case):
    record, reason = BAD[case]
    dataset = make(record, {"image": "a.png", "conversations": [QUESTION, ANSWER]})
    with pytest.raises(UnusableSample, match=reason):
        dataset.get(0, 0)
    assert dataset.get(1, 0)["image_flags"].any(), "the record after it is not touched"
    assert dataset.describe(0).startswith("mine line 1 (") and dataset.describe(1).startswith("mine line 2 (")


def test_empty_answer(make):
    """As upstream: internvl2_5 trains the end marker of an empty answer; older templates leave the slot open."""
    record = {"conversations": [{"from": "human", "value": "Say nothing."}, {"from": "gpt", "value": ""}]}
    labels = make(record).get(0, 0)["labels"]
    assert (labels != -100).sum() == 1
    with pytest.raises(UnusableSample, match="no answer to train on"):
        make(record, conv_style="Hermes-2").get(0, 0)


def test_truncation(make):
    record = {"image": "a.png", "conversations": [QUESTION, ANSWER]}
    whole = make(record, max_dynamic_patch=1).get(0, 0)
    ids, labels = whole["input_ids"], whole["labels"]
    context = make(record).tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    last_image_token = int((ids == context).nonzero().max())
    first_trained = int((labels != -100).nonzero().min())
    for limit in range(1, len(ids) + 1):
        dataset = make(record, max_length=limit, max_dynamic_patch=1)
        if limit <= last_image_token:
            held = int((ids[:limit] == context).sum())
            with pytest.raises(
                UnusableSample, match=rf"{len(ids)} tokens.*{limit}.*{held} of 4 image.*--max_dynamic_patch"
            ):
                dataset.get(0, 0)
        elif limit <= first_trained:
            with pytest.raises(UnusableSample, match=f"first {limit} of its {len(ids)} tokens"):
                dataset.get(0, 0)
        else:
            sample = dataset.get(0, 0)
            assert torch.equal(sample["input_ids"], ids[:limit]) and torch.equal(sample["labels"], labels[:limit])
