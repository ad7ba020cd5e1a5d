"""Samples equal those recorded from upstream; unusable records are reported.

Intended differences: samples are not padded (upstream pads to `model_max_length` unless it groups by length). Upstream
replaces a record that fails by a random other one; ours raises UnusableSample or, if the record is valid, uses it.
"""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from helpers.samples import (
    ANSWER,
    HAS_RECORDED_VERSIONS,
    QUESTION,
    ROUNDING_TOLERANCE,
    UNUSABLE_RECORDS,
    are_samples_equal,
    build_recorded_dataset,
    make_turns,
    read_recorded_configs,
    read_recorded_samples,
)

from internvl.constants import UnusableSample
from internvl.data.supervised_dataset import LazySupervisedDataset


def assert_equals_recorded(sample: dict, recorded: dict, where: str):
    length = sum(map(int, recorded["attention_mask"]))
    for key in ("input_ids", "labels", "position_ids"):
        assert sample[key].dtype == torch.int64
        assert sample[key].tolist() == recorded[key][:length], f"{where} {key}"
    assert sample["image_flags"].tolist() == recorded["image_flags"], where
    pixels, digest = sample["pixel_values"], recorded["pixel_values"]
    assert list(pixels.shape) == digest["shape"] and pixels.dtype == torch.float32, where
    if HAS_RECORDED_VERSIONS:
        assert hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest() == digest["sha256"], where
    else:
        torch.testing.assert_close(
            pixels.flatten()[:8], torch.tensor(digest["first8"]), atol=ROUNDING_TOLERANCE, rtol=0
        )
        assert abs(pixels.mean().item() - digest["mean"]) < 1e-3, where


def test_recorded_samples(goldens):
    num_compared = num_stray = 0
    for name, config in read_recorded_configs(goldens).items():
        dataset = build_recorded_dataset(goldens, config)
        recorded_samples = read_recorded_samples(goldens, name)
        assert len(dataset) == config["len"] == len(recorded_samples)
        for index, recorded in enumerate(recorded_samples):
            where = f"{name} {index} (id {recorded['id']})"
            if recorded["replaced_by_id"] is not None:
                continue  # see test_records_that_upstream_replaced
            if all(label == -100 for label in recorded["labels"]):
                with pytest.raises(UnusableSample, match="no loss tokens"):
                    dataset.get(index, 0)
                continue
            sample = dataset[index]
            if stray := has_stray_placeholder(dataset.annotations[index]):
                remove_stray_placeholder(recorded, sample)
            assert_equals_recorded(sample, recorded, where)
            num_compared += 1
            num_stray += stray
    assert num_compared > 50 and num_stray > 0


def has_stray_placeholder(record: dict) -> bool:
    """Return whether upstream adds a literal `<image>` line to the system turn.

    It does so if the system turn has none, although the question has.
    """
    first, *others = record["conversations"]
    in_question = any("<image>" in turn["value"] for turn in others if turn["from"] == "human")
    has_single_image = isinstance(record.get("image"), str)
    return in_question and has_single_image and first["from"] == "system" and "<image>" not in first["value"]


def remove_stray_placeholder(recorded: dict, sample: dict):
    """Remove upstream's extra tokens from a recorded sample.

    They start where the tokens first differ.
    """
    length = sum(map(int, recorded["attention_mask"]))
    ours, theirs = sample["input_ids"].tolist(), recorded["input_ids"][:length]
    num_extra = length - len(ours)
    assert 0 < num_extra <= 8, "a few tokens for one line"
    start = next(i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
    for key in ("input_ids", "labels"):
        recorded[key] = recorded[key][:start] + recorded[key][start + num_extra : length]
    recorded["attention_mask"] = recorded["attention_mask"][num_extra:length]
    recorded["position_ids"] = recorded["position_ids"][: len(ours)]


def test_records_that_upstream_replaced(goldens):
    """Missing files and wrong placeholder counts are reported; system turns are used.

    Upstream's older templates refuse system turns. After one, a missing placeholder goes to the first human turn.
    """
    reasons = {}
    for name, config in read_recorded_configs(goldens).items():
        dataset = build_recorded_dataset(goldens, config)
        for index, recorded in enumerate(read_recorded_samples(goldens, name)):
            if recorded["replaced_by_id"] is None:
                continue
            record = dataset.annotations[index]
            try:
                sample = dataset.get(index, 0)
            except UnusableSample as reason:
                reasons[str(recorded["id"])] = str(reason)
                continue
            system, human = record["conversations"][:2]
            assert system["from"] == "system", f"{name} {index}: only records with a system turn may pass"
            text = dataset.tokenizer.decode(sample["input_ids"])
            assert system["value"].strip() in text
            if "image" in record:
                assert text.index("<img>") > text.index(system["value"].strip())
    assert reasons.keys() >= {"bad_missing_file", "bad_count"} and "bad_system_first" not in reasons
    assert "does_not_exist.png does not exist" in reasons["bad_missing_file"]
    assert "1 <image>" in reasons["bad_count"] and "2 images" in reasons["bad_count"]


def test_recorded_repeat_times(goldens):
    """Intended difference: a fraction is a random part.

    Upstream takes the first records, or fails (1.5).
    """
    config = read_recorded_configs(goldens)["dyn_thumb"]
    for row in json.loads((goldens / "dataset" / "configs.json").read_text())["repeat_time"]:
        dataset = build_recorded_dataset(goldens, config, repeat_time=row["repeat_time"])
        assert len(dataset) == (int(14 * row["repeat_time"]) if "error" in row else len(row["ids"]))
        if row["repeat_time"] == int(row["repeat_time"]):
            assert [dataset.read_record(i)["id"] for i in range(len(dataset))] == row["ids"]
    assert len(build_recorded_dataset(goldens, config, repeat_time=2.0)) == 28


# -- records of our own ------------------------------------------------------------------------------------------------


def decode_sample(dataset: LazySupervisedDataset, index: int = 0) -> str:
    """Decode a sample, writing an image of n tokens as [n]."""
    text = dataset.tokenizer.decode(dataset.get(index, 0)["input_ids"])
    for n in range(100, 0, -1):
        text = text.replace("<img>" + "<IMG_CONTEXT>" * n + "</img>", f"[{n}]")
    return text


@pytest.mark.parametrize("repeat_time", [0.02, 0.3, 0.5, 0.999, 1, 1.0, 1.7, 2, 2.5, 7.25])
def test_repeat_time_is_full_copies_and_a_random_part(make_dataset, repeat_time):
    records = [{"id": n, "conversations": make_turns("What?", "A.")} for n in range(60)]

    def read_ids(**changes) -> list[int]:
        dataset = make_dataset(*records, meta={"repeat_time": repeat_time}, **changes)
        assert [int(dataset.describe(i).split()[2]) - 1 for i in range(len(dataset))] == list(dataset.record_indices)
        return [dataset.read_record(i)["id"] for i in range(len(dataset))]

    num_copies, num_drawn = divmod(int(60 * repeat_time), 60)
    ids = read_ids()
    copied, drawn = ids[: 60 * num_copies], ids[60 * num_copies :]
    assert copied == list(range(60)) * num_copies and len(drawn) == num_drawn
    assert drawn == sorted(set(drawn)), "without replacement, in the order of the file"
    assert ids == read_ids(), "determined by the seed"
    if 1 < num_drawn < 59:
        assert ids != read_ids(seed=1) and drawn != list(range(num_drawn)), "at random"


def test_every_record_is_equally_likely_to_be_drawn(make_dataset):
    records = [{"conversations": make_turns("What?", "A.")}] * 10
    drawn = [make_dataset(*records, meta={"repeat_time": 0.3}, seed=seed).record_indices for seed in range(300)]
    counts = np.bincount(np.concatenate(drawn), minlength=10)
    assert np.abs(counts - 90).max() < 4 * np.sqrt(300 * 0.3 * 0.7), counts


def test_missing_placeholders_go_to_the_first_human_turn(make_dataset):
    system = {"from": "system", "value": "Be brief."}
    dataset = make_dataset(
        {"image": "a.png", "conversations": [system, *make_turns("What?", "A.")]},
        {"image": ["a.png", "b.jpg"], "conversations": [system, *make_turns("What?", "A.")]},
        {"image": "a.png", "conversations": make_turns("Hello.", "Hello.", "Now <image> this?", "B.")},
        {"image": ["a.png"], "conversations": make_turns("What?", "A.")},
        max_dynamic_patch=1,
    )
    assert "user\n[4]\nWhat?" in decode_sample(dataset, 0)
    assert "user\n[4]\n[4]\nWhat?" in decode_sample(dataset, 1)
    assert "user\nHello." in decode_sample(dataset, 2) and "Now [4] this?" in decode_sample(dataset, 2), (
        "a placeholder stays where it is"
    )
    assert "user\n[4]\nWhat?" in decode_sample(dataset, 3)


def test_surplus_placeholders_stay_text_with_the_flag(make_dataset):
    """As in upstream; test_schema_records.py has the default."""
    record = {"image": "a.png", "conversations": make_turns("<image> and <image>?", "A <image>.")}
    dataset = make_dataset(record, max_dynamic_patch=1, keep_surplus_placeholders=True)
    assert "[4] and <image>?" in decode_sample(dataset) and "A <image>." in decode_sample(dataset)


def test_null_and_empty_media_mean_a_text_record(make_dataset):
    records = [{"image": value, "video": value, "conversations": make_turns("What?", "A.")} for value in (None, "", [])]
    dataset = make_dataset(*records)
    for index in range(3):
        sample = dataset.get(index, 0)
        assert sample["image_flags"].tolist() == [] and sample["pixel_values"].shape == (0, 3, 28, 28)
        assert "user\nWhat?" in decode_sample(dataset, index)


def test_images_of_a_record_share_the_maximum_of_tiles(make_dataset):
    images = ["a.png"] * 3
    dataset = make_dataset({"image": images, "conversations": make_turns("Which?", "A.")}, max_dynamic_patch=7)
    assert len(dataset.get(0, 0)["image_flags"]) == 3 * (2 + 1), "7 // 3 = 2 tiles each, and a thumbnail each"
    dataset = make_dataset(
        {"image": images, "conversations": make_turns("Which?", "A.")}, meta={"max_dynamic_patch": 2}
    )
    assert len(dataset.get(0, 0)["image_flags"]) == 3, "max_dynamic_patch of the meta entry overrides the flag, 12"


@pytest.mark.parametrize("question", ["<video>\nWhat?", "<video>What?", "What?"])
def test_videos_become_frames(make_dataset, question):
    record = {"video": "frames", "conversations": [{"from": "system", "value": "S"}, *make_turns(question, "A.")]}
    dataset = make_dataset(record, min_num_frame=3, max_num_frame=3)
    sample = dataset.get(0, 0)
    assert sample["image_flags"].tolist() == [1, 1, 1]
    assert "user\nFrame-1: [4]\nFrame-2: [4]\nFrame-3: [4]\nWhat?" in decode_sample(dataset)


def test_index_epoch_and_seed_determine_a_sample(make_dataset):
    video = {"video": "frames", "conversations": make_turns("What?", "A.")}
    image = {"image": "a.png", "conversations": make_turns("What?", "A.")}

    def make_fresh(seed=0):
        return make_dataset(
            video, image, image, seed=seed, meta={"data_augment": True}, min_num_frame=2, max_num_frame=9
        )

    dataset, copy = make_fresh(), pickle.loads(pickle.dumps(make_fresh()))
    backwards = {(i, e): copy.get(i, e) for e in (2, 1, 0) for i in (2, 1, 0)}
    for (i, e), sample in backwards.items():
        assert are_samples_equal(sample, dataset.get(i, e)), "the same in another order and another process"
    assert not are_samples_equal(backwards[1, 0], backwards[1, 1]), "JPEG quality changes with the epoch"
    assert not are_samples_equal(backwards[1, 0], backwards[2, 0]), "and with the index"
    assert not are_samples_equal(backwards[1, 0], make_fresh(seed=1).get(1, 0)), "and with the seed"
    assert len(backwards[0, 0]["image_flags"]) == len(backwards[0, 1]["image_flags"]), "the length does not change"


def test_samples_do_not_depend_on_the_number_of_workers(make_dataset):
    image = {"image": "b.jpg", "conversations": make_turns("What?", "A.")}
    dataset = make_dataset(*[image] * 12, meta={"data_augment": True})
    without_workers = list(torch.utils.data.DataLoader(dataset, batch_size=None, shuffle=False))
    with_workers = list(torch.utils.data.DataLoader(dataset, batch_size=None, shuffle=False, num_workers=2))
    assert len(without_workers) == len(with_workers) == 12
    assert all(map(are_samples_equal, without_workers, with_workers))


@pytest.mark.parametrize("case", UNUSABLE_RECORDS)
def test_unusable_records_are_reported_with_the_reason(make_dataset, case):
    record, reason = UNUSABLE_RECORDS[case]
    dataset = make_dataset(record, {"image": "a.png", "conversations": [QUESTION, ANSWER]})
    with pytest.raises(UnusableSample, match=reason):
        dataset.get(0, 0)
    assert dataset.get(1, 0)["image_flags"].any(), "the next record is used"
    assert dataset.describe(0).startswith("mine line 1 (") and dataset.describe(1).startswith("mine line 2 (")


def test_loss_of_an_empty_answer(make_dataset):
    """As upstream: the end marker with internvl2_5, none with older templates."""
    record = {"conversations": [{"from": "human", "value": "Say nothing."}, {"from": "gpt", "value": ""}]}
    labels = make_dataset(record).get(0, 0)["labels"]
    assert (labels != -100).sum() == 1
    with pytest.raises(UnusableSample, match="no loss tokens"):
        make_dataset(record, conv_style="Hermes-2").get(0, 0)


def test_truncated_samples_keep_their_images_and_an_answer(make_dataset):
    record = {"image": "a.png", "conversations": [QUESTION, ANSWER]}
    full = make_dataset(record, max_dynamic_patch=1).get(0, 0)
    ids, labels = full["input_ids"], full["labels"]
    context_id = make_dataset(record).tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    last_image_token = int((ids == context_id).nonzero().max())
    first_loss_token = int((labels != -100).nonzero().min())
    for limit in range(1, len(ids) + 1):
        dataset = make_dataset(record, max_length=limit, max_dynamic_patch=1)
        if limit <= last_image_token:
            num_left = int((ids[:limit] == context_id).sum())
            with pytest.raises(
                UnusableSample, match=rf"{len(ids)} tokens.*{limit}.*{num_left} of 4 image.*--max_dynamic_patch"
            ):
                dataset.get(0, 0)
        elif limit <= first_loss_token:
            with pytest.raises(UnusableSample, match=f"first {limit} of its {len(ids)} tokens"):
                dataset.get(0, 0)
        else:
            sample = dataset.get(0, 0)
            assert torch.equal(sample["input_ids"], ids[:limit]) and torch.equal(sample["labels"], labels[:limit])
