"""Tiles and transforms, byte by byte as recorded; broken files; counting without decoding."""

import hashlib
import json
import random

import PIL
import pytest
import torch
import torchvision
from PIL import Image, ImageFile
from safetensors.torch import load_file

from internvl.constants import UnusableSample
from internvl.data.images import (
    build_transform,
    count_tiles,
    dynamic_preprocess,
    expand2square,
    load_image,
    read_image_size,
    simulate_jpeg_degradation,
    tile_grids,
)

# The arithmetic that the goldens were recorded with; another one may differ in the last bit.
SAME_ARITHMETIC = PIL.__version__ == "13.0.0" and torchvision.__version__.startswith("0.29.1")
GREY_LEVELS = 0.04  # two steps of 1 / 255, normalised: where another Pillow rounds otherwise while it resizes


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- tiling ------------------------------------------------------------------------------------------------------------


def test_recorded_tilings(goldens):
    for row in rows(goldens / "tiling.jsonl"):
        keys = ("min_num", "max_num", "image_size", "use_thumbnail")
        args = {key: row[key] for key in keys}
        size = row["width"], row["height"]
        assert count_tiles(*size, **args) == row["num_tiles"], row
        without_thumbnail = count_tiles(*size, **args | {"use_thumbnail": False})
        assert without_thumbnail == row["grid"][0] * row["grid"][1], row
        if size[0] * size[1] < 10**6:
            tiles = dynamic_preprocess(Image.new("L", size), **args)
            assert len(tiles) == row["num_tiles"] and {tile.size for tile in tiles} == {(row["image_size"],) * 2}, row


def test_recorded_tiles(goldens):
    for row in rows(goldens / "images" / "tiles.jsonl"):
        image = Image.open(goldens / "images" / row["image"])
        if row["converted_to_rgb_first"]:
            image = image.convert("RGB")
        args = {key: row[key] for key in ("min_num", "max_num", "image_size", "use_thumbnail")}
        tiles = [
            {"size": list(tile.size), "mode": tile.mode, "sha256": sha256(tile.tobytes())}
            for tile in dynamic_preprocess(image, **args)
        ]
        if not SAME_ARITHMETIC:
            tiles, row["tiles"] = ([tile | {"sha256": None} for tile in some] for some in (tiles, row["tiles"]))
        assert tiles == row["tiles"], row["image"]


def test_counting_agrees_with_cutting():
    draw = random.Random(0)
    for _ in range(300):
        size = draw.randint(1, 300), draw.randint(1, 300)
        args = {
            "min_num": draw.randint(1, 5),
            "max_num": draw.randint(1, 14),
            "image_size": draw.choice([14, 28, 56]),
            "use_thumbnail": draw.random() < 0.5,
        }
        assert len(dynamic_preprocess(Image.new("L", size), **args)) == count_tiles(*size, **args), (size, args)


def test_grids_are_all_products_in_range_in_the_order_of_a_plain_triple_loop():
    for low, high in [(1, 1), (1, 6), (1, 12), (2, 2), (4, 5), (3, 12), (1, 40), (7, 24), (5, 4)]:
        plain = {
            (i, j)
            for n in range(low, high + 1)
            for i in range(1, n + 1)
            for j in range(1, n + 1)
            if low <= i * j <= high
        }
        assert list(tile_grids(low, high)) == sorted(plain, key=lambda grid: grid[0] * grid[1])


def test_squared_images(goldens):
    for row in rows(goldens / "images" / "expand2square.jsonl"):
        colour = row["background"]
        image = Image.open(goldens / "images" / row["image"])
        image = expand2square(image, tuple(colour) if isinstance(colour, list) else colour)
        assert [list(image.size), image.mode, sha256(image.tobytes())] == [row["size"], row["mode"], row["sha256"]]


# -- transforms --------------------------------------------------------------------------------------------------------


def test_recorded_transforms(goldens):
    expected = load_file(goldens / "images" / "transforms.safetensors")
    for case in json.loads((goldens / "images" / "transforms.json").read_text())["cases"]:
        image = Image.open(goldens / "images" / case["image"])
        args = [case[key] for key in ("is_train", "input_size", "pad2square", "normalize_type")]
        # Upstream draws the quality from the shared generator; ours from the one it is given, in the same way.
        tensor = build_transform(*args, generator=random.Random(case["python_random_seed"]))(image)
        assert tensor.dtype == torch.float32
        if SAME_ARITHMETIC:
            assert sha256(tensor.numpy().tobytes()) == case["digest"]["sha256"], case["key"]
        elif case["is_train"]:
            assert abs(tensor.mean().item() - case["digest"]["mean"]) < 1e-2, case["key"]
        else:
            torch.testing.assert_close(tensor, expected[case["key"]], atol=GREY_LEVELS, rtol=0)
        if case["is_train"]:
            degraded = simulate_jpeg_degradation(case["jpeg_quality"])(image)
            again = build_transform(False, case["input_size"], False, case["normalize_type"])(degraded)
            assert torch.equal(tensor, again), "a train transform is JPEG of the recorded quality, then the plain one"


def test_unknown_normalisation_lists_the_known():
    with pytest.raises(NotImplementedError, match="'vgg'.*imagenet, clip, siglip"):
        build_transform(False, 28, normalize_type="vgg")


# -- files -------------------------------------------------------------------------------------------------------------


def half_of(source: Image.Image, path) -> str:
    source.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return str(path)


def noise(size=(90, 70)) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp"])
def test_truncated_image_is_a_bad_sample_although_its_header_is_whole(tmp_path, suffix):
    path = half_of(noise(), tmp_path / f"half.{suffix}")
    with pytest.raises(UnusableSample, match=rf"half\.{suffix} .*cannot be read"):
        load_image(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_header_tells_the_size(tmp_path):
    noise((37, 91)).save(tmp_path / "a.jpg")
    assert read_image_size(str(tmp_path / "a.jpg")) == (37, 91)
    assert load_image(str(tmp_path / "a.jpg")).size == (37, 91)


@pytest.mark.parametrize("read", [load_image, read_image_size])
def test_files_that_are_no_images(tmp_path, read, monkeypatch):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    noise((200, 200)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # makes 200 x 200 a decompression bomb
    for name, reason in [
        ("absent.png", "does not exist"),
        ("text.png", "not an image"),
        ("empty.png", "0 bytes.*not an image"),
        ("folder.png", "directory"),
        ("huge.png", "40000 pixels"),
    ]:
        with pytest.raises(UnusableSample, match=f"{name}.*{reason}"):
            read(str(tmp_path / name))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    (Image.new("I;16", (20, 10)) if mode == "I;16" else noise((20, 10)).convert(mode)).save(path)
    assert load_image(str(path)).mode == "RGB"
