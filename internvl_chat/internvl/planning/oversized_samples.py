"""Split samples larger than a row into pieces that fit (`--allow_overflow`).

As in upstream, a piece ends where the row is full, or before an image that would not fit completely. The next piece
starts at the next image, so text in between, or after the last image, is lost. Pieces with hardly any loss tokens, or
without any of their sample's images, are dropped. Unlike in upstream, pieces are separate documents whose positions
start at 0, and samples without images, for which upstream fails, are split without losing tokens.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from internvl.constants import IGNORE_INDEX, UnusableSample

MIN_LOSS_SHARE = 1 / 256  # share of loss tokens that a piece must exceed


class ImageSpan(NamedTuple):
    """An image in a sample: `input_ids[start:stop]`, start and end tokens included."""

    start: int
    stop: int
    tiles: int


class SamplePiece(NamedTuple):
    """A piece of a sample: `input_ids[start:stop]` and `pixel_values[first_tile:last_tile]`."""

    start: int
    stop: int
    loss_tokens: int
    first_tile: int
    last_tile: int

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Tokens, loss tokens, tiles."""
        return self.stop - self.start, self.loss_tokens, self.last_tile - self.first_tile

    def extract_from(self, sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Extract this piece of a sample, as a sample."""
        text = {name: sample[name][self.start : self.stop] for name in ("input_ids", "labels")}
        tiles = {name: sample[name][self.first_tile : self.last_tile] for name in ("pixel_values", "image_flags")}
        return {**text, "position_ids": torch.arange(self.stop - self.start), **tiles}


def find_image_spans(input_ids: Sequence[int] | torch.Tensor, context_id: int, num_image_token: int) -> list[ImageSpan]:
    """Find the images of a sample, in order.

    Args:
        context_id: id of <IMG_CONTEXT>.
        num_image_token: number of these tokens per tile.
    """
    is_edge = np.diff(np.asarray(input_ids) == context_id, prepend=False, append=False)
    runs = np.flatnonzero(is_edge).reshape(-1, 2).tolist()  # start and stop of each run of context tokens
    return [
        ImageSpan(start - 1, min(stop + 1, len(input_ids)), (stop - start) // num_image_token) for start, stop in runs
    ]


def split_sample(
    labels: Sequence[int] | torch.Tensor, images: Sequence[ImageSpan], max_tokens: int, max_tiles: int
) -> list[SamplePiece]:
    """Split a sample into pieces that fit into a row.

    Args:
        labels: (L,)
        images: all images of the sample, in order.

    Raises:
        UnusableSample: an image is larger than a row, or all pieces are dropped.
    """
    # (L + 1,) loss tokens before each position
    loss_tokens_before = np.append(0, np.cumsum(np.asarray(labels) != IGNORE_INDEX))
    pieces, start, total = [], 0, len(labels)
    while start < total:
        stop = min(total, start + max_tokens)
        images_ahead = [image for image in images if image.start >= start]
        tiles = np.cumsum([image.tiles for image in images_ahead])
        next_image = next(
            (image for image, n in zip(images_ahead, tiles, strict=True) if image.stop > stop or n > max_tiles), None
        )
        # After the last image the rest is lost. Without images the next piece starts where this one ends.
        next_start = next_image.start if next_image else total if images else stop
        stop = min(stop, next_start)
        if stop == start:
            assert next_image is not None  # otherwise `stop` is `start + max_tokens` or the end
            raise UnusableSample(
                f"an image of {next_image.stop - next_image.start} tokens and {next_image.tiles} tiles does not fit "
                f"into a row of --max_packed_tokens {max_tokens} and --num_images_expected {max_tiles}"
            )
        loss_tokens = int(loss_tokens_before[stop] - loss_tokens_before[start])
        pieces.append(
            SamplePiece(start, stop, loss_tokens, _count_tiles_before(images, start), _count_tiles_before(images, stop))
        )
        start = next_start
    kept = []
    for piece in pieces:
        num_tokens, num_loss_tokens, num_tiles = piece.lengths
        if num_loss_tokens > MIN_LOSS_SHARE * num_tokens and (num_tiles or not images):
            kept.append(piece)
    if not kept:
        raise UnusableSample(
            f"none of its {len(pieces)} pieces that fit into a row has enough loss tokens (more than "
            f"{MIN_LOSS_SHARE:.1%}) and an image"
        )
    return kept


def _count_tiles_before(images: Iterable[ImageSpan], position: int) -> int:
    return sum(image.tiles for image in images if image.start < position)
