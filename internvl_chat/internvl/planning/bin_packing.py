"""Bin packing of samples into rows, in two dimensions: tokens and tiles.

A row has at most `max_tokens` and `max_tiles`. Samples of equal size (tokens, tiles) are interchangeable, so rows are
first composed of sizes, from a histogram of all sizes, and then samples are assigned to them. The run time grows with
the number of different sizes, not of samples: a million samples take half a second.

Rows are composed one at a time by first fit decreasing, with three refinements:

- Samples with and without tiles alternate, so tiles are spread evenly over the rows.
- The choice among sizes that fit is random, so a sample has other neighbors in every epoch.
- The last two samples of a row are chosen together, to leave as little room as possible.

Example: `max_tokens` 10, `max_tiles` 4, and the six samples (6, 2), (6, 2), (3, 0), (3, 0), (1, 0), (1, 0).

1. The longest size opens the row: (6, 2). It leaves 4 tokens and 2 tiles.
2. All samples together have 4 tiles in 20 tokens, 0.2 per token. The row has 2 tiles in 6 tokens, more than its share,
   so the next sample is one without tiles. The longest that fits is (3, 0). As two of that size do not fit, this sample
   and the last one are chosen together: (3, 0) and (1, 0) leave no room.
3. The row [(6, 2), (3, 0), (1, 0)] is full. There are two samples of each of its sizes, so two such rows are made, and
   all samples are packed.

After "Efficient Sequence Packing without Cross-contamination" (arXiv 2107.02027), with tiles as a second dimension.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator

import numpy as np

RANDOM_SHARE = 0.5  # a size is drawn from this share of the sizes that fit, the longest ones
MAX_LAST_PAIRS = 24  # candidates for the second to last sample of a row

Size = tuple[int, int]  # tokens, tiles


def pack_samples(
    tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pack samples into rows.

    Args:
        tokens, tiles: (N,) integers; no sample is larger than a row.

    Returns:
        order: (N,) the samples of the first row, then those of the second, ...
        row_starts: (R + 1,) where in `order` each row starts; the last entry is N.
    """
    assert (tokens <= max_tokens).all() and (tiles <= max_tiles).all(), "a sample is larger than a row"
    # One integer per size: tokens * (max_tiles + 1) + tiles.
    radix = max_tiles + 1
    codes = tokens.astype(np.int64) * radix + tiles
    code_counts = np.bincount(codes, minlength=1)
    size_codes = np.flatnonzero(code_counts)  # ascending: (K,) the sizes that occur
    size_counts = code_counts[size_codes]
    size_ids = np.cumsum(code_counts > 0)[codes] - 1  # (N,) of each sample, from 0 to K - 1
    # Group samples by size, in random order within a size. numpy sorts 16-bit integers in linear time.
    shuffled = rng.permutation(len(codes)).astype(np.int32 if len(codes) < 2**31 else np.int64)
    sort_dtype = np.uint16 if len(size_codes) < 1 << 16 else np.int32
    by_size = shuffled[np.argsort(size_ids[shuffled].astype(sort_dtype), kind="stable")]
    next_sample = np.concatenate([[0], np.cumsum(size_counts)])  # the first unused sample of each size in `by_size`
    id_of_code = dict(zip(size_codes.tolist(), range(len(size_codes)), strict=True))

    blocks, row_lengths = [], []
    histogram = _SizeHistogram(size_codes // radix, size_codes % radix, size_counts)
    for row, times in _compose_rows(histogram, max_tokens, max_tiles, rng):
        block = np.empty((times, len(row)), by_size.dtype)  # `times` rows of the same sizes
        for column, (num_tokens, num_tiles) in zip(rng.permutation(len(row)), row, strict=True):
            size_id = id_of_code[num_tokens * radix + num_tiles]
            block[:, column] = by_size[next_sample[size_id] : next_sample[size_id] + times]
            next_sample[size_id] += times
        blocks.append(block.ravel())
        row_lengths.append(np.full(times, len(row)))
    row_starts = np.concatenate([[0], *row_lengths]).cumsum()
    return np.concatenate([by_size[:0], *blocks]), row_starts


class _SizeHistogram:
    """How many unpacked samples there are of each size, searchable by bisection."""

    def __init__(self, tokens: np.ndarray, tiles: np.ndarray, counts: np.ndarray):
        sizes = list(zip(tokens.tolist(), tiles.tolist(), strict=True))
        self.counts: dict[Size, int] = dict(zip(sizes, counts.tolist(), strict=True))
        self.tokens_by_tiles: dict[int, list[int]] = {}  # number of tiles -> numbers of tokens, ascending
        for num_tokens, num_tiles in sizes:
            self.tokens_by_tiles.setdefault(num_tiles, []).append(num_tokens)
        self.tile_counts = sorted(self.tokens_by_tiles)

    def find_longest(self, max_tokens: int, max_tiles: int, min_tiles: int = 0) -> Size | None:
        """Find the longest size within the limits.

        Of several with the same number of tokens it is the one with most tiles.
        """
        best = None
        for num_tiles in self.tile_counts:
            if min_tiles <= num_tiles <= max_tiles:
                tokens = self.tokens_by_tiles[num_tiles]
                end = bisect_right(tokens, max_tokens)
                if end and (best is None or tokens[end - 1] >= best[0]):
                    best = tokens[end - 1], num_tiles
        return best

    def draw_similar(self, size: Size, rng: np.random.Generator) -> Size:
        """Draw a size with as many tiles and about as many tokens.

        It has at most as many tokens; sizes close to the given one are drawn more often.
        """
        tokens = self.tokens_by_tiles[size[1]]
        end = bisect_right(tokens, size[0])
        return tokens[end - 1 - int(end * RANDOM_SHARE * rng.random() ** 2)], size[1]

    def list_shorter(self, size: Size) -> list[Size]:
        """List this size and shorter ones of as many tiles, longest first."""
        tokens = self.tokens_by_tiles[size[1]]
        end = bisect_right(tokens, size[0])
        return [(num_tokens, size[1]) for num_tokens in tokens[max(0, end - MAX_LAST_PAIRS) : end][::-1]]

    def remove(self, row: Counter[Size], times: int) -> None:
        """Remove the samples of `times` equal rows."""
        for size, uses in row.items():
            self.counts[size] -= uses * times
            if not self.counts[size]:
                tokens = self.tokens_by_tiles[size[1]]
                del tokens[bisect_right(tokens, size[0]) - 1]
                if not tokens:
                    self.tile_counts.remove(size[1])


def _compose_rows(
    histogram: _SizeHistogram, max_tokens: int, max_tiles: int, rng: np.random.Generator
) -> Iterator[tuple[list[Size], int]]:
    """Compose rows until no sample is left.

    Yields:
        The sizes in a row, and the number of such rows.
    """
    tokens_left = sum(num_tokens * n for (num_tokens, _), n in histogram.counts.items())
    tiles_left = sum(num_tiles * n for (_, num_tiles), n in histogram.counts.items())
    while histogram.tile_counts:
        row = _compose_row(histogram, max_tokens, max_tiles, tiles_left / tokens_left, rng)
        uses = Counter(row)
        # Repeat the row as often as there are samples of its sizes: this makes the run time independent of the number
        # of samples.
        times = min(histogram.counts[size] // n for size, n in uses.items())
        tokens_left -= times * sum(num_tokens for num_tokens, _ in row)
        tiles_left -= times * sum(num_tiles for _, num_tiles in row)
        histogram.remove(uses, times)
        yield row, times


class _Row:
    """A row under construction, with the room that is left in it."""

    def __init__(self, histogram: _SizeHistogram, max_tokens: int, max_tiles: int):
        self.histogram = histogram
        self.tokens_left, self.tiles_left = max_tokens, max_tiles
        self.sizes: list[Size] = []
        self.used: Counter[Size] = Counter()

    def add(self, size: Size) -> None:
        self.sizes.append(size)
        self.used[size] += 1
        self.tokens_left -= size[0]
        self.tiles_left -= size[1]

    def is_available(self, size: Size) -> bool:
        # The histogram is updated after each row, so it still contains what this row has used.
        return self.used[size] < self.histogram.counts[size]

    def find_longest(self, max_tokens: int, max_tiles: int, min_tiles: int = 0) -> Size | None:
        """Find the longest available size within the limits."""
        while (size := self.histogram.find_longest(max_tokens, max_tiles, min_tiles)) and not self.is_available(size):
            max_tokens = size[0] - 1
        return size

    def choose_with_partner(self, size: Size) -> Size:
        """Choose the second to last size: `size`, or a shorter one.

        Together with the longest size that fits after it, it leaves the least room.
        """
        candidates = []
        for first in self.histogram.list_shorter(size):
            if self.is_available(first):
                self.used[first] += 1  # the partner may be of the same size
                second = self.find_longest(self.tokens_left - first[0], self.tiles_left - first[1])
                self.used[first] -= 1
                filled = first[0] + (second[0] if second else 0)
                candidates.append((filled, first))
                if filled == self.tokens_left:
                    break
        return max(candidates)[1]


def _compose_row(
    histogram: _SizeHistogram, max_tokens: int, max_tiles: int, tiles_per_token: float, rng: np.random.Generator
) -> list[Size]:
    """Compose one row, starting with the longest size.

    Args:
        tiles_per_token: of all samples that are not packed yet, the target ratio of the row.
    """
    row = _Row(histogram, max_tokens, max_tiles)
    excess_tiles = 0.0  # tiles of the row beyond its share
    size = row.find_longest(max_tokens, max_tiles)
    while size:
        row.add(size)
        excess_tiles += size[1] - tiles_per_token * size[0]
        longest = row.find_longest(row.tokens_left, row.tiles_left)
        if longest is None:
            break
        # Prefer text if the row has more than its share of tiles, else a sample with tiles. Otherwise take what fits.
        fewest, most = (1, row.tiles_left) if excess_tiles <= 0 else (0, 0)
        size = row.find_longest(row.tokens_left, most, fewest) or longest
        if 2 * size[0] <= row.tokens_left:  # room for more than one of this size
            drawn = histogram.draw_similar(size, rng)
            size = drawn if row.is_available(drawn) else size
        else:
            size = row.choose_with_partner(size)
    return row.sizes
