"""Tiles and transforms equal the recorded ones."""

import hashlib
import json
import random

import pytest
import torch
from helpers.samples import HAS_RECORDED_VERSIONS, ROUNDING_TOLERANCE
from PIL import Image
from safetensors.torch import load_file

from internvl.data.images import (
    build_transform,
    count_tiles,
    dynamic_preprocess,
    expand2square,
    list_tile_grids,
    simulate_jpeg_degradation,
)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


TILING_KEYS = ("min_num", "max_num", "image_size", "use_thumbnail")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- tiling ------------------------------------------------------------------------------------------------------------


def test_recorded_tile_counts(goldens):
    for row in read_rows(goldens / "tiling.jsonl"):
        args = {key: row[key] for key in TILING_KEYS}
        size = row["width"], row["height"]
        assert count_tiles(*size, **args) == row["num_tiles"], row
        without_thumbnail = count_tiles(*size, **args | {"use_thumbnail": False})
        assert without_thumbnail == row["grid"][0] * row["grid"][1], row
        if size[0] * size[1] < 10**6:
            tiles = dynamic_preprocess(Image.new("L", size), **args)
            assert len(tiles) == row["num_tiles"] and {tile.size for tile in tiles} == {(row["image_size"],) * 2}, row


def test_recorded_tiles(goldens):
    for row in read_rows(goldens / "images" / "tiles.jsonl"):
        image = Image.open(goldens / "images" / row["image"])
        if row["converted_to_rgb_first"]:
            image = image.convert("RGB")
        args = {key: row[key] for key in TILING_KEYS}
        tiles = [
            {"size": list(tile.size), "mode": tile.mode, "sha256": sha256(tile.tobytes())}
            for tile in dynamic_preprocess(image, **args)
        ]
        if not HAS_RECORDED_VERSIONS:
            tiles, row["tiles"] = ([tile | {"sha256": None} for tile in group] for group in (tiles, row["tiles"]))
        assert tiles == row["tiles"], row["image"]


def test_count_tiles_agrees_with_dynamic_preprocess():
    generator = random.Random(0)
    for _ in range(300):
        size = generator.randint(1, 300), generator.randint(1, 300)
        args = {
            "min_num": generator.randint(1, 5),
            "max_num": generator.randint(1, 14),
            "image_size": generator.choice([14, 28, 56]),
            "use_thumbnail": generator.random() < 0.5,
        }
        assert len(dynamic_preprocess(Image.new("L", size), **args)) == count_tiles(*size, **args), (size, args)


def test_grids_are_those_of_a_plain_triple_loop_in_its_order():
    for low, high in [(1, 1), (1, 6), (1, 12), (2, 2), (4, 5), (3, 12), (1, 40), (7, 24), (5, 4)]:
        expected = {
            (i, j)
            for n in range(low, high + 1)
            for i in range(1, n + 1)
            for j in range(1, n + 1)
            if low <= i * j <= high
        }
        assert list(list_tile_grids(low, high)) == sorted(expected, key=lambda grid: grid[0] * grid[1])


def test_recorded_square_padding(goldens):
    for row in read_rows(goldens / "images" / "expand2square.jsonl"):
        color = row["background"]
        image = Image.open(goldens / "images" / row["image"])
        image = expand2square(image, tuple(color) if isinstance(color, list) else color)
        assert [list(image.size), image.mode, sha256(image.tobytes())] == [row["size"], row["mode"], row["sha256"]]


# -- transforms --------------------------------------------------------------------------------------------------------


def test_recorded_transforms(goldens):
    expected = load_file(goldens / "images" / "transforms.safetensors")
    for case in json.loads((goldens / "images" / "transforms.json").read_text())["cases"]:
        image = Image.open(goldens / "images" / case["image"])
        args = [case[key] for key in ("is_train", "input_size", "pad2square", "normalize_type")]
        # Upstream draws the quality from the global generator, ours in the same way from the one it is given.
        tensor = build_transform(*args, generator=random.Random(case["python_random_seed"]))(image)
        assert tensor.dtype == torch.float32
        if HAS_RECORDED_VERSIONS:
            assert sha256(tensor.numpy().tobytes()) == case["digest"]["sha256"], case["key"]
        elif case["is_train"]:
            assert abs(tensor.mean().item() - case["digest"]["mean"]) < 1e-2, case["key"]
        else:
            torch.testing.assert_close(tensor, expected[case["key"]], atol=ROUNDING_TOLERANCE, rtol=0)
        if case["is_train"]:
            degraded = simulate_jpeg_degradation(case["jpeg_quality"])(image)
            again = build_transform(False, case["input_size"], False, case["normalize_type"])(degraded)
            # Training is JPEG of the recorded quality, then the transform of inference.
            assert torch.equal(tensor, again)


def test_unknown_normalization_is_reported_with_the_supported_ones():
    with pytest.raises(NotImplementedError, match="'vgg'.*imagenet, clip, siglip"):
        build_transform(False, 28, normalize_type="vgg")
