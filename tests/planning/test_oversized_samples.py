"""Samples larger than a row: split so that images stay whole and parts fit, as recorded from upstream, or told of."""

import json

import numpy as np
import pytest
import torch
from helpers.samples import recorded_configs, recorded_dataset
from hypothesis import given
from hypothesis import strategies as st

from internvl.arguments.training import DataTrainingArguments
from internvl.constants import UnusableSample
from internvl.planning.oversized_samples import MIN_LOSS_SHARE, ImageSpan, find_image_spans, split_sample
from internvl.planning.packed_dataset import PackedDataset
from internvl.planning.sample_lengths import SINGLE_RANK, measure_dataset
from internvl.train.build_data import TrainingData, split_oversized_samples

MARKS = {"begin": 7, "context": 8, "end": 9}  # ids of <img>, <IMG_CONTEXT>, </img>
TOKENS_OF_A_TILE = 3


@st.composite
def samples(draw) -> tuple[list[int], list[int], list[int]]:
    """input_ids, labels and the numbers of tiles of the images, in between stretches of text."""
    tiles = draw(st.lists(st.integers(1, 5), max_size=5))
    ids, labels = [], []
    for count in [*tiles, 0]:
        text, trained = draw(st.integers(0, 20)), draw(st.booleans())
        ids += [1] * text
        labels += [1 if trained else -100] * text
        if count:
            ids += [MARKS["begin"], *[MARKS["context"]] * (TOKENS_OF_A_TILE * count), MARKS["end"]]
            labels += [-100] * (TOKENS_OF_A_TILE * count + 2)
    return ids, labels, tiles


@given(samples(), st.integers(1, 40), st.integers(1, 8))
def test_parts_fit_keep_images_whole_and_follow_each_other(sample, max_tokens, max_tiles):
    ids, labels, tiles = sample
    images = find_image_spans(ids, MARKS["context"], TOKENS_OF_A_TILE)
    assert [image.tiles for image in images] == tiles
    largest = max((TOKENS_OF_A_TILE * count + 2 for count in tiles), default=0)
    try:
        parts = split_sample(labels, images, max_tokens, max_tiles)
    except UnusableSample as reason:
        too_large = largest > max_tokens or max(tiles, default=0) > max_tiles
        assert ("does not fit into a row" in str(reason)) == too_large
        assert too_large or "worth training" in str(reason)
        return
    for part in parts:
        tokens, trained, shown = part.size
        assert 0 < tokens <= max_tokens and shown <= max_tiles
        assert trained == sum(label != -100 for label in labels[part.start : part.stop]) > MIN_LOSS_SHARE * tokens
        inside = ids[part.start : part.stop]
        assert inside.count(MARKS["begin"]) == inside.count(MARKS["end"])
        assert inside.count(MARKS["context"]) == TOKENS_OF_A_TILE * shown
        assert part.first == ids[: part.start].count(MARKS["context"]) / TOKENS_OF_A_TILE
        assert shown or not images
    assert all(one.stop <= other.start for one, other in zip(parts, parts[1:], strict=False))
    if not images:
        trained = [label != -100 for label in labels]
        assert sum(part.trained for part in parts) == sum(trained), "text is cut without a loss"


def test_a_sample_that_fits_is_one_part():
    images = [ImageSpan(2, 10, 2)]
    (part,) = split_sample([-100] * 12 + [5, 5], images, 14, 2)
    assert part.size == (14, 2, 2) and part.start == part.first == 0


@pytest.fixture
def data(goldens, tmp_path):
    """The recorded data sets by name, measured."""

    def make(config: str, **meta) -> TrainingData:
        dataset = recorded_dataset(goldens, recorded_configs(goldens)[config], **meta)
        found = measure_dataset(dataset, cache_dir=str(tmp_path), progress=False)
        return TrainingData(PackedDataset([dataset]), found.lengths, found.digests, [], None)

    return make


def test_parts_are_those_recorded(goldens, data):
    """`cut_static_tiles`: rows of 64 tokens, an image a tile; its items are parts of single samples."""
    recorded = json.loads((goldens / "dataset/packed/cut_static_tiles.json").read_text())
    whole = data("static_group_clip", annotation=str(goldens / "dataset/ds_main_img.jsonl"))
    room = recorded["max_packed_tokens"], recorded["num_images_expected"]
    args = DataTrainingArguments(
        use_packed_ds=True, allow_overflow=True, max_packed_tokens=room[0], num_images_expected=room[1]
    )
    split_data = split_oversized_samples(whole, args, SINGLE_RANK)
    usable = np.flatnonzero(split_data.usable).tolist()
    assert max(usable) >= split_data.rows.ends[-1], "nothing was split"
    ours = {tuple(split_data.rows[0, sample]["input_ids"].tolist()) for sample in usable}
    items = {tuple(item["input_ids"]) for item in recorded["items"]}
    decode = whole.rows.datasets[0].tokenizer.decode
    # Upstream put a second `<image>` into the system turn of one of them (see test_dataset.py).
    assert ["system\n<image>" in decode(item) for item in items - ours] == [True]
    assert len(items & ours) == 3


def test_parts_are_samples_of_an_epoch(data):
    before = data("dyn_thumb_group")
    tokens = before.lengths.tokens.copy()
    args = DataTrainingArguments(use_packed_ds=True, allow_overflow=True, max_packed_tokens=110, num_images_expected=14)
    after = split_oversized_samples(before, args, SINGLE_RANK)
    large = np.flatnonzero(tokens > 110)
    assert len(large) and not after.lengths.tokens[large].any()
    assert len(set(after.digests[after.usable].tolist())) == after.usable.sum()
    for sample in np.flatnonzero(after.usable).tolist():
        row = after.rows[0, sample]
        sizes = len(row["input_ids"]), int((row["labels"] != -100).sum()), len(row["pixel_values"])
        assert sizes == tuple(values[sample] for values in after.lengths)
        assert torch.equal(row["position_ids"], torch.arange(sizes[0]))
    named = {bad.line for bad in after.bad_samples}
    split_up = {sample for sample, _ in after.rows.parts}
    assert {after.rows.locate(sample)[1] + 1 for sample in set(large.tolist()) - split_up} == named


def test_without_the_flag_they_are_named(data):
    before = data("dyn_thumb_group")
    args = DataTrainingArguments(use_packed_ds=True, max_packed_tokens=110, num_images_expected=14)
    large = int((before.lengths.tokens > 110).sum())
    after = split_oversized_samples(before, args, SINGLE_RANK)
    assert len(after.bad_samples) == large > 0 and not after.rows.parts
    assert "do not fit into a row of --max_packed_tokens 110" in after.bad_samples[0].reason
    assert "--allow_overflow True splits such samples" in after.bad_samples[0].reason
