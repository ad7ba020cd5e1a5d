"""Cut images into tiles, transform tiles to tensors.

Training and inference share this code. `count_tiles` predicts the number of tiles from the image header. The arithmetic
is that of the published models: tests compare tiles with recorded ones, byte by byte.
"""

import io
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torchvision.transforms as T
from PIL import Image
from torchvision.transforms.functional import InterpolationMode

from internvl.constants import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIGLIP_MEAN,
    SIGLIP_STD,
)
from internvl.data.image_files import load_image as load_image  # the image whose tiles these are

# --normalize_type -> (mean, standard deviation) of the channels.
NORMALIZATION_STATS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": (CLIP_MEAN, CLIP_STD),
    "siglip": (SIGLIP_MEAN, SIGLIP_STD),
}
qualities = list(range(75, 101))  # of the JPEG degradation

# -- tiling ------------------------------------------------------------------------------------------------------------


@lru_cache
def list_tile_grids(min_num: int, max_num: int) -> tuple[tuple[int, int], ...]:
    """List all grids (columns, rows) of min_num to max_num tiles.

    They are sorted by number of tiles. Grids of equal area keep the order in which CPython iterates over a set that was
    built in this order. With min_num > 1, two of them can be equally close to an image's aspect ratio, and the
    published models were trained with that order.
    """
    grids = {
        (columns, rows)
        for num_tiles in range(min_num, max_num + 1)
        for columns in range(1, num_tiles + 1)
        for rows in range(1, min(num_tiles, max_num // columns) + 1)
        if columns * rows >= min_num
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def find_closest_aspect_ratio(aspect_ratio, target_ratios, width, height, image_size) -> tuple[int, int]:
    """Choose the grid with the closest aspect ratio (width / height).

    Of two equally close grids the larger is chosen if the image has more than half as many pixels as that grid. Without
    any `target_ratios` the result is (1, 1).
    """
    best_grid, best_distance = (1, 1), float("inf")
    for columns, rows in target_ratios:
        distance = abs(aspect_ratio - columns / rows)
        has_enough_pixels = width * height > 0.5 * image_size * image_size * columns * rows
        if distance < best_distance or (distance == best_distance and has_enough_pixels):
            best_grid, best_distance = (columns, rows), distance
    return best_grid


def _choose_grid(width: int, height: int, min_num: int, max_num: int, image_size: int) -> tuple[int, int]:
    grids = list_tile_grids(min_num, max_num)
    return find_closest_aspect_ratio(width / height, grids, width, height, image_size)


def count_tiles(width: int, height: int, min_num: int, max_num: int, image_size: int, use_thumbnail: bool) -> int:
    """Count the tiles that `dynamic_preprocess` makes of an image of this size."""
    columns, rows = _choose_grid(width, height, min_num, max_num, image_size)
    return columns * rows + (use_thumbnail and columns * rows != 1)


def dynamic_preprocess(
    image: Image.Image, min_num: int = 1, max_num: int = 6, image_size: int = 448, use_thumbnail: bool = False
) -> list[Image.Image]:
    """Resize an image to a grid of square tiles and cut it.

    The grid is the one with the closest aspect ratio.

    Args:
        min_num, max_num: fewest and most tiles, not counting the thumbnail.
        image_size: side of a tile in pixels.
        use_thumbnail: append the full image, resized to one tile, if there are several tiles.

    Returns:
        The tiles row by row, then the thumbnail.
    """
    columns, rows = _choose_grid(*image.size, min_num, max_num, image_size)
    resized = image.resize((image_size * columns, image_size * rows))
    corners = [(x * image_size, y * image_size) for y in range(rows) for x in range(columns)]
    tiles = [resized.crop((x, y, x + image_size, y + image_size)) for x, y in corners]
    if use_thumbnail and len(tiles) != 1:
        tiles.append(image.resize((image_size, image_size)))
    return tiles


# -- transforms --------------------------------------------------------------------------------------------------------


def expand2square(pil_img: Image.Image, background_color) -> Image.Image:
    """Pad an image to a square, centered."""
    width, height = pil_img.size
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square


def simulate_jpeg_degradation(quality: int) -> Callable[[Image.Image], Image.Image]:
    """Return a function that degrades an image by JPEG of this quality."""

    def degrade(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return degrade


jpeg_degrade_functions = {quality: simulate_jpeg_degradation(quality) for quality in qualities}


def build_transform(
    is_train: bool,
    input_size: int,
    pad2square: bool = False,
    normalize_type: str = "imagenet",
    generator: random.Random | None = None,
    normalize: bool = True,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> T.Compose:
    """Build the transform from a tile to a tensor (3, input_size, input_size).

    Args:
        is_train: degrade every tile by JPEG of a quality drawn from 75..100. `pad2square` is ignored then.
        pad2square: pad with the mean color instead of stretching.
        normalize_type: key of NORMALIZATION_STATS.
        generator: draws the JPEG qualities; by default Python's global generator.
        normalize: return normalized float32. Otherwise return uint8, to be normalized later by `normalize_tiles`.
        statistics: mean and standard deviation of the channels, instead of those of `normalize_type`.
    """
    if normalize_type not in NORMALIZATION_STATS:
        known = ", ".join(NORMALIZATION_STATS)
        raise NotImplementedError(f"normalize_type {normalize_type!r} is not supported: expected one of {known}.")
    mean, std = statistics or NORMALIZATION_STATS[normalize_type]
    draw_fn = (generator or random).choices
    steps: list[Any] = [T.Lambda(lambda image: image.convert("RGB"))]
    if is_train:
        steps.append(T.Lambda(lambda image: jpeg_degrade_functions[draw_fn(qualities)[0]](image)))
    elif pad2square:
        mean_color = tuple(int(channel * 255) for channel in mean)
        steps.append(T.Lambda(lambda image: expand2square(image, mean_color)))
    steps.append(T.Resize((input_size, input_size), interpolation=InterpolationMode.BICUBIC))
    steps += [T.ToTensor(), T.Normalize(mean, std)] if normalize else [T.PILToTensor()]
    return T.Compose(steps)


def normalize_tiles(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalize uint8 tiles (..., 3, H, W) to float32 on their device.

    The operations and their order are those of torchvision's ToTensor and Normalize: results are bitwise equal.
    """
    # `torch.tensor(values, device=...)` would wait for the device.
    stats = torch.tensor([mean, std]).to(pixel_values.device, non_blocking=True)
    shift, scale = stats.view(2, 3, 1, 1).unbind()
    return pixel_values.float().div_(255).sub_(shift).div_(scale)
