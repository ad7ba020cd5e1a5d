"""Samples larger than a row: split as upstream splits, or skipped."""

import json

import numpy as np
import pytest
import torch
from helpers.samples import build_recorded_dataset, read_recorded_configs
from hypothesis import given
from hypothesis import strategies as st

from internvl.arguments.data import DataTrainingArguments
from internvl.constants import UnusableSample
from internvl.planning.oversized_samples import MIN_LOSS_SHARE, ImageSpan, find_image_spans, split_sample
from internvl.planning.packed_dataset import PackedDataset
from internvl.planning.sample_lengths import SINGLE_RANK, measure_dataset
from internvl.train.build_data import TrainingData, split_oversized_samples

MARKS = {"begin": 7, "context": 8, "end": 9}  # ids of <img>, <IMG_CONTEXT>, </img>
TOKENS_PER_TILE = 3


@st.composite
def samples(draw) -> tuple[list[int], list[int], list[int]]:
    """Draw input_ids, labels and the tiles of each image."""
    tiles = draw(st.lists(st.integers(1, 5), max_size=5))
    ids, labels = [], []
    for count in [*tiles, 0]:
        text, has_loss = draw(st.integers(0, 20)), draw(st.booleans())
        ids += [1] * text
        labels += [1 if has_loss else -100] * text
        if count:
            ids += [MARKS["begin"], *[MARKS["context"]] * (TOKENS_PER_TILE * count), MARKS["end"]]
            labels += [-100] * (TOKENS_PER_TILE * count + 2)
    return ids, labels, tiles


@given(samples(), st.integers(1, 40), st.integers(1, 8))
def test_pieces_fit_into_a_row_and_keep_images_together(sample, max_tokens, max_tiles):
    ids, labels, tiles = sample
    images = find_image_spans(ids, MARKS["context"], TOKENS_PER_TILE)
    assert [image.tiles for image in images] == tiles
    largest = max((TOKENS_PER_TILE * count + 2 for count in tiles), default=0)
    try:
        pieces = split_sample(labels, images, max_tokens, max_tiles)
    except UnusableSample as error:
        too_large = largest > max_tokens or max(tiles, default=0) > max_tiles
        assert ("does not fit into a row" in str(error)) == too_large
        assert too_large or "has enough loss tokens" in str(error)
        return
    for piece in pieces:
        num_tokens, num_loss_tokens, num_tiles = piece.lengths
        assert 0 < num_tokens <= max_tokens and num_tiles <= max_tiles
        assert num_loss_tokens == sum(label != -100 for label in labels[piece.start : piece.stop])
        assert num_loss_tokens > MIN_LOSS_SHARE * num_tokens
        inside = ids[piece.start : piece.stop]
        assert inside.count(MARKS["begin"]) == inside.count(MARKS["end"])
        assert inside.count(MARKS["context"]) == TOKENS_PER_TILE * num_tiles
        assert piece.first_tile == ids[: piece.start].count(MARKS["context"]) / TOKENS_PER_TILE
        assert num_tiles or not images
    assert all(one.stop <= other.start for one, other in zip(pieces, pieces[1:], strict=False))
    if not images:
        num_loss_tokens = sum(label != -100 for label in labels)
        assert sum(piece.loss_tokens for piece in pieces) == num_loss_tokens, "text is cut without a loss"


def test_sample_that_fits_is_one_piece():
    images = [ImageSpan(2, 10, 2)]
    (piece,) = split_sample([-100] * 12 + [5, 5], images, 14, 2)
    assert piece.lengths == (14, 2, 2) and piece.start == piece.first_tile == 0


@pytest.fixture
def data(goldens, tmp_path):
    """Measures the recorded datasets, by name."""

    def make(config: str, **meta) -> TrainingData:
        dataset = build_recorded_dataset(goldens, read_recorded_configs(goldens)[config], **meta)
        measurements = measure_dataset(dataset, cache_dir=str(tmp_path), show_progress=False)
        arrays = measurements.lengths, measurements.digests
        return TrainingData(PackedDataset([dataset]), *arrays, [], None, measurements.lost_loss_tokens)

    return make


def test_pieces_equal_those_recorded_from_upstream(goldens, data):
    """`cut_static_tiles` has rows of 64 tokens and one tile per image."""
    recorded = json.loads((goldens / "dataset/packed/cut_static_tiles.json").read_text())
    unsplit = data("static_group_clip", annotation=str(goldens / "dataset/ds_main_img.jsonl"))
    room = recorded["max_packed_tokens"], recorded["num_images_expected"]
    args = DataTrainingArguments(
        use_packed_ds=True, allow_overflow=True, max_packed_tokens=room[0], num_images_expected=room[1]
    )
    split_data = split_oversized_samples(unsplit, args, SINGLE_RANK)
    usable = np.flatnonzero(split_data.is_usable).tolist()
    assert max(usable) >= split_data.dataset.num_unsplit, "nothing was split"
    ours = {tuple(split_data.dataset[0, sample]["input_ids"].tolist()) for sample in usable}
    items = {tuple(item["input_ids"]) for item in recorded["items"]}
    decode = unsplit.dataset.datasets[0].tokenizer.decode
    # Upstream put a second `<image>` into the system turn of one of them (see test_supervised_dataset.py).
    assert ["system\n<image>" in decode(item) for item in items - ours] == [True]
    assert len(items & ours) == 3


def test_pieces_are_samples_of_an_epoch(data):
    before = data("dyn_thumb_group")
    tokens, loss_tokens = before.lengths["tokens"].copy(), before.lengths["loss_tokens"].copy()
    args = DataTrainingArguments(use_packed_ds=True, allow_overflow=True, max_packed_tokens=110, num_images_expected=14)
    after = split_oversized_samples(before, args, SINGLE_RANK)
    large = np.flatnonzero(tokens > 110)
    assert len(large) and not after.lengths["tokens"][large].any()
    assert len(set(after.digests[after.is_usable].tolist())) == after.is_usable.sum()
    for sample in np.flatnonzero(after.is_usable).tolist():
        row = after.dataset[0, sample]
        sizes = len(row["input_ids"]), int((row["labels"] != -100).sum()), len(row["pixel_values"])
        assert sizes == after.lengths[sample].item()
        assert torch.equal(row["position_ids"], torch.arange(sizes[0]))
    skipped = {sample.line for sample in after.skipped_samples}
    split = {sample for sample, _ in after.dataset.pieces}
    for sample in split:
        num_kept = sum(piece.loss_tokens for other, piece in after.dataset.pieces if other == sample)
        assert num_kept + after.lost_loss_tokens[sample] == loss_tokens[sample]
    assert after.lost_loss_tokens.sum() == after.lost_loss_tokens[sorted(split)].sum()
    assert {after.dataset.locate(sample)[1] + 1 for sample in set(large.tolist()) - split} == skipped


def test_without_the_flag_they_are_skipped(data):
    before = data("dyn_thumb_group")
    args = DataTrainingArguments(use_packed_ds=True, max_packed_tokens=110, num_images_expected=14)
    large = int((before.lengths["tokens"] > 110).sum())
    after = split_oversized_samples(before, args, SINGLE_RANK)
    assert len(after.skipped_samples) == large > 0 and not after.dataset.pieces
    assert "do not fit into a row of --max_packed_tokens 110" in after.skipped_samples[0].reason
    assert "--allow_overflow True splits such samples" in after.skipped_samples[0].reason
