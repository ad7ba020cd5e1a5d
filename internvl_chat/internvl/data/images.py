"""Pictures to tiles to tensors: loading, tiling by aspect ratio, transforms.

Used by `dataset.py` for training, by `lengths.py` through it to count tiles without decoding, and by whoever asks a
trained model. The arithmetic is that of the published models; tests hold it to recorded tiles byte by byte.
"""

import io
import os
import random
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

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
    UnusableSample,
)
from internvl.data.file_io import MissingPackage, open_file

NORMALIZATION = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": (CLIP_MEAN, CLIP_STD),
    "siglip": (SIGLIP_MEAN, SIGLIP_STD),
}
qualities = list(range(75, 101))
# What pictures may be, whatever their names say. PIL knows more: EPS, for one, which it has Ghostscript run.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX")
IMAGE_FORMATS += ("SGI", "QOI", "DDS", "PSD")


def load_image(path: str) -> Image.Image:
    """Decode an image file to RGB; BadSample when it is missing, broken, cut short, or of more than
    PIL.Image.MAX_IMAGE_PIXELS."""
    return read_image(path, lambda image: image.convert("RGB"))


def read_image_size(path: str) -> tuple[int, int]:
    """(width, height) from the header of an image file, pixels not decoded; BadSample like `load_image`."""
    return read_image(path, lambda image: image.size, header=True)


def read_image(path: str, use: Callable[[Image.Image], object], header: bool = False):
    """What `use` makes of the opened file, of which `header` says that it reads the beginning only; BadSample in place
    of whatever goes wrong."""
    try:
        with open_file(path, header) as file, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                return use(image)
    except MissingPackage:
        raise
    except FileNotFoundError as error:
        raise UnusableSample(f"image {path} does not exist") from error
    except Exception as error:  # PIL's parsers raise whatever broken bytes lead them to
        # PIL's own sentence repeats the path when it does not know the format.
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
        size = f" ({os.path.getsize(path)} bytes)" if os.path.isfile(path) else ""
        raise UnusableSample(f"image {path}{size} cannot be read: {reason}") from error


def pil_loader(img_str: bytes) -> Image.Image:
    """Bytes of an image file to an RGB image."""
    return Image.open(io.BytesIO(img_str), formats=IMAGE_FORMATS).convert("RGB")


@lru_cache
def tile_grids(min_num: int, max_num: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with min_num <= columns * rows <= max_num, smallest area first.

    Grids of equal area keep the order in which CPython iterates over a set filled this way: with min_num > 1 two of
    them can fit an image equally well, and the published models were trained with that order.
    """
    grids = {
        (columns, rows)
        for n in range(min_num, max_num + 1)
        for columns in range(1, n + 1)
        for rows in range(1, min(n, max_num // columns) + 1)
        if columns * rows >= min_num
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def find_closest_aspect_ratio(aspect_ratio, target_ratios, width, height, image_size) -> tuple[int, int]:
    """The grid among `target_ratios` whose aspect ratio is nearest to `aspect_ratio` = width / height.

    Between equally near ones the larger is taken if the image has more than half as many pixels. None given: (1, 1).
    """
    best, best_distance = (1, 1), float("inf")
    for columns, rows in target_ratios:
        distance = abs(aspect_ratio - columns / rows)
        fills_more = width * height > 0.5 * image_size * image_size * columns * rows
        if distance < best_distance or (distance == best_distance and fills_more):
            best, best_distance = (columns, rows), distance
    return best


def _grid(width: int, height: int, min_num: int, max_num: int, image_size: int) -> tuple[int, int]:
    return find_closest_aspect_ratio(width / height, tile_grids(min_num, max_num), width, height, image_size)


def count_tiles(width: int, height: int, min_num: int, max_num: int, image_size: int, use_thumbnail: bool) -> int:
    """How many tiles `dynamic_preprocess` cuts from an image of this size."""
    columns, rows = _grid(width, height, min_num, max_num, image_size)
    return columns * rows + (use_thumbnail and columns * rows != 1)


def dynamic_preprocess(
    image: Image.Image, min_num: int = 1, max_num: int = 6, image_size: int = 448, use_thumbnail: bool = False
) -> list[Image.Image]:
    """Stretch an image onto the grid of nearest aspect ratio and cut it into square tiles, row by row.

    Args:
        min_num, max_num: fewest and most tiles, the thumbnail not counted.
        image_size: side of a tile in pixels.
        use_thumbnail: append the whole image as one more tile when there are several.
    """
    columns, rows = _grid(*image.size, min_num, max_num, image_size)
    stretched = image.resize((image_size * columns, image_size * rows))
    corners = [(x * image_size, y * image_size) for y in range(rows) for x in range(columns)]
    tiles = [stretched.crop((x, y, x + image_size, y + image_size)) for x, y in corners]
    if use_thumbnail and len(tiles) != 1:
        tiles.append(image.resize((image_size, image_size)))
    return tiles


def expand2square(pil_img: Image.Image, background_color) -> Image.Image:
    """Pad an image to a square around its centre."""
    width, height = pil_img.size
    side = max(width, height)
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - width) // 2, (side - height) // 2))
    return square


def simulate_jpeg_degradation(quality: int) -> Callable[[Image.Image], Image.Image]:
    """A function that sends an image through JPEG of this quality, in memory."""

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
    normalized: bool = True,
) -> T.Compose:
    """Tile to float tensor (3, input_size, input_size), normalised.

    Args:
        is_train: degrade every tile by JPEG of a quality drawn from 75..100; `pad2square` is not looked at then.
        pad2square: pad with the mean colour instead of stretching.
        normalize_type: mean and deviation: imagenet, clip or siglip.
        generator: draws the JPEG qualities; by default Python's shared one.
        normalized: False for the uint8 tensor of which `normalize` makes the float one, elsewhere.
    """
    if normalize_type not in NORMALIZATION:
        raise NotImplementedError(f"normalize_type {normalize_type!r} is not one of {', '.join(NORMALIZATION)}.")
    mean, std = NORMALIZATION[normalize_type]
    draw = (generator or random).choices
    steps = [T.Lambda(lambda image: image.convert("RGB"))]
    if is_train:
        steps.append(T.Lambda(lambda image: jpeg_degrade_functions[draw(qualities)[0]](image)))
    elif pad2square:
        colour = tuple(int(channel * 255) for channel in mean)
        steps.append(T.Lambda(lambda image: expand2square(image, colour)))
    steps.append(T.Resize((input_size, input_size), interpolation=InterpolationMode.BICUBIC))
    steps += [T.ToTensor(), T.Normalize(mean, std)] if normalized else [T.PILToTensor()]
    return T.Compose(steps)


def normalize(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Tiles (..., 3, H, W) of bytes to float32, on their device: the arithmetic of ToTensor and Normalize."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return pixels.float().div_(255).sub_(mean).div_(std)
