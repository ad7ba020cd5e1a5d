"""A sample that is larger than a row -> parts that fit, for `--allow_overflow`. Between `lengths.py` and the plan.

Upstream's rule: a part ends where the row is full, or before an image that would not fit whole; the next one begins
with the next image, and text in between, or behind the last image, is lost. A part that hardly trains anything, or
shows none of its sample's images, is dropped. Unlike upstream's, parts are documents of their own (positions begin at
0), and text without any image, on which upstream fails, is cut without a loss.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from internvl.constants import IGNORE_INDEX, UnusableSample

MIN_LOSS_SHARE = 1 / 256  # share of the labels of a part


class ImageSpan(NamedTuple):
    """`input_ids[start:stop]`, its begin and end marks included, stand for so many tiles."""

    start: int
    stop: int
    tiles: int


class SamplePiece(NamedTuple):
    """`input_ids[start:stop]`, of which so many are trained, and `pixel_values[first:last]` of a sample."""

    start: int
    stop: int
    trained: int
    first: int
    last: int

    @property
    def size(self) -> tuple[int, int, int]:
        """Tokens, trained tokens, tiles."""
        return self.stop - self.start, self.trained, self.last - self.first

    def of(self, sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This part of a Sample, a Sample itself."""
        text = {name: sample[name][self.start : self.stop] for name in ("input_ids", "labels")}
        tiles = {name: sample[name][self.first : self.last] for name in ("pixel_values", "image_flags")}
        return {**text, "position_ids": torch.arange(self.stop - self.start), **tiles}


def find_image_spans(input_ids: Sequence[int], context_id: int, num_image_token: int) -> list[ImageSpan]:
    """The images of a sample, in order; `context_id` is the image token."""
    shown = np.diff(np.asarray(input_ids) == context_id, prepend=False, append=False)
    runs = np.flatnonzero(shown).reshape(-1, 2).tolist()
    return [
        ImageSpan(start - 1, min(stop + 1, len(input_ids)), (stop - start) // num_image_token) for start, stop in runs
    ]


def split_sample(
    labels: Sequence[int], images: Sequence[ImageSpan], max_tokens: int, max_tiles: int
) -> list[SamplePiece]:
    """Parts of a sample with these (L,) labels, none of more tokens or tiles than a row has room for.

    Raises:
        BadSample: an image is larger than a row, or nothing worth training is left.
    """
    trained = np.append(0, np.cumsum(np.asarray(labels) != IGNORE_INDEX))  # before each position
    parts, start, total = [], 0, len(labels)
    while start < total:
        stop = min(total, start + max_tokens)
        ahead = [image for image in images if image.start >= start]
        tiles = np.cumsum([image.tiles for image in ahead])
        cut = next((i for i, n in zip(ahead, tiles, strict=True) if i.stop > stop or n > max_tiles), None)
        following = cut.start if cut else total if images else stop
        stop = min(stop, following)
        if stop == start:
            raise UnusableSample(
                f"an image of {cut.stop - cut.start} tokens and {cut.tiles} tiles does not fit into a row of "
                f"--max_packed_tokens {max_tokens} and --num_images_expected {max_tiles}"
            )
        shown = _tiles_before(images, start), _tiles_before(images, stop)
        parts.append(SamplePiece(start, stop, int(trained[stop] - trained[start]), *shown))
        start = following
    sizes = [part.size for part in parts]
    kept = [
        part
        for part, (tokens, answers, tiles) in zip(parts, sizes, strict=True)
        if answers > MIN_LOSS_SHARE * tokens and (tiles or not images)
    ]
    if not kept:
        raise UnusableSample(f"of its {len(parts)} parts that fit into a row none is worth training")
    return kept


def _tiles_before(images: Iterable[ImageSpan], position: int) -> int:
    return sum(image.tiles for image in images if image.start < position)
