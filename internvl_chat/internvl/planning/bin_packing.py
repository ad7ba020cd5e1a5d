"""Samples to rows: which samples share a row, so that rows are full and alike. Pure numpy, below `plan.py`.

A row has room for so many tokens and so many tiles. Samples of equal size are exchangeable, so rows are composed of
sizes (a histogram) and only then filled with samples: the time taken grows with the number of different sizes, not of
samples. Composing is first fit decreasing, a row at a time, with two refinements: text and pictures alternate so that
every row gets its share of tiles, and the last two samples of a row are chosen together, to fill it to the brim. In
between chance has a say, so that a sample meets others in every epoch.
After "Efficient Sequence Packing without Cross-contamination" (arXiv 2107.02027), with a second dimension.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator

import numpy as np

SPREAD = 0.5  # among what share of the sizes that fit chance chooses
PAIRS = 24  # candidates for the last but one sample of a row


def pack_samples(
    tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Lay samples into rows.

    Args:
        tokens, tiles: (N,) integers; no sample is larger than a row.

    Returns:
        order: (N,) the samples of the first row, then those of the second, ...
        starts: (R + 1,) where in `order` each row starts; the last is N.
    """
    assert (tokens <= max_tokens).all() and (tiles <= max_tiles).all(), "a sample is larger than a row"
    wide = max_tiles + 1
    sizes = tokens.astype(np.int64) * wide + tiles
    counts = np.bincount(sizes, minlength=1)
    kinds = np.flatnonzero(counts)
    label = np.cumsum(counts > 0)[sizes] - 1
    shuffled = rng.permutation(len(sizes)).astype(np.int32 if len(sizes) < 2**31 else np.int64)
    # A stable sort of 16-bit numbers takes linear time.
    narrow = np.uint16 if len(kinds) < 1 << 16 else np.int32
    by_kind = shuffled[np.argsort(label[shuffled].astype(narrow), kind="stable")]
    following = np.concatenate([[0], np.cumsum(counts[kinds])])  # next sample of each kind in `by_kind`
    number = dict(zip(kinds.tolist(), range(len(kinds)), strict=True))
    rows, lengths = [], []
    sizes_left = _Sizes(kinds // wide, kinds % wide, counts[kinds])
    for row, times in _compose(sizes_left, max_tokens, max_tiles, rng):
        block = np.empty((times, len(row)), by_kind.dtype)
        for column, (length, pictures) in zip(rng.permutation(len(row)), row, strict=True):
            kind = number[length * wide + pictures]
            block[:, column] = by_kind[following[kind] : following[kind] + times]
            following[kind] += times
        rows.append(block.ravel())
        lengths.append(np.full(times, len(row)))
    starts = np.concatenate([[0], *lengths]).cumsum()
    return np.concatenate([by_kind[:0], *rows]), starts


class _Sizes:
    """A multiset of sizes (tokens, tiles), from which the largest that fits is found by bisection."""

    def __init__(self, tokens: np.ndarray, tiles: np.ndarray, counts: np.ndarray):
        sizes = list(zip(tokens.tolist(), tiles.tolist(), strict=True))
        self.counts = dict(zip(sizes, counts.tolist(), strict=True))
        self.lengths: dict[int, list[int]] = {}  # by number of tiles, ascending
        for length, pictures in sizes:
            self.lengths.setdefault(pictures, []).append(length)
        self.tiles = sorted(self.lengths)

    def largest(self, tokens: int, tiles: int, least: int = 0) -> tuple[int, int] | None:
        """The longest size of at most `tokens` and of `least` to `tiles` tiles; the one of more tiles among equals."""
        best = None
        for pictures in self.tiles:
            if least <= pictures <= tiles:
                lengths = self.lengths[pictures]
                place = bisect_right(lengths, tokens)
                if place and (best is None or lengths[place - 1] >= best[0]):
                    best = lengths[place - 1], pictures
        return best

    def random(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
        """One of as many tiles, not longer, more often the nearer."""
        lengths = self.lengths[size[1]]
        place = bisect_right(lengths, size[0])
        return lengths[place - 1 - int(place * SPREAD * rng.random() ** 2)], size[1]

    def below(self, size: tuple[int, int]) -> list[int]:
        """Some lengths of as many tiles, descending from the given one."""
        lengths = self.lengths[size[1]]
        place = bisect_right(lengths, size[0])
        return lengths[max(0, place - PAIRS) : place][::-1]

    def remove(self, row: Counter, times: int) -> None:
        for size, uses in row.items():
            self.counts[size] -= uses * times
            if not self.counts[size]:
                lengths = self.lengths[size[1]]
                del lengths[bisect_right(lengths, size[0]) - 1]
                if not lengths:
                    self.tiles.remove(size[1])


def _compose(
    left: _Sizes, max_tokens: int, max_tiles: int, rng: np.random.Generator
) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Rows as lists of sizes, each with the number of times that it can be had, until nothing is left."""
    total_tokens = sum(length * n for (length, _), n in left.counts.items())
    total_tiles = sum(pictures * n for (_, pictures), n in left.counts.items())
    while left.tiles:
        row = _fill(left, max_tokens, max_tiles, total_tiles / total_tokens, rng)
        uses = Counter(row)
        times = min(left.counts[size] // n for size, n in uses.items())
        total_tokens -= times * sum(length for length, _ in row)
        total_tiles -= times * sum(pictures for _, pictures in row)
        left.remove(uses, times)
        yield row, times


def _fill(left: _Sizes, tokens: int, tiles: int, density: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """One row, begun with the longest size there is; `density`: tiles a token that it should have."""
    row, used = [], Counter()
    ahead = 0.0  # tiles that the row has beyond its share

    def largest(room: int, space: int, least: int = 0) -> tuple[int, int] | None:
        """The largest size that fits and is not used up by this very row."""
        while (size := left.largest(room, space, least)) and used[size] >= left.counts[size]:
            room = size[0] - 1
        return size

    def take(size: tuple[int, int]) -> None:
        nonlocal tokens, tiles, ahead
        row.append(size)
        used[size] += 1
        tokens, tiles, ahead = tokens - size[0], tiles - size[1], ahead + size[1] - density * size[0]

    size = largest(tokens, tiles)
    while size:
        take(size)
        longest = largest(tokens, tiles)
        if longest is None:
            break
        size = (largest(tokens, tiles, 1) if ahead <= 0 else largest(tokens, 0)) or longest
        if tokens - size[0] >= size[0]:
            drawn = left.random(size, rng)
            size = drawn if used[drawn] < left.counts[drawn] else size
        else:  # two more at most of this kind: the pair that leaves least room
            pairs = []
            for length in left.below(size):
                first = (length, size[1])
                if used[first] < left.counts[first]:
                    used[first] += 1
                    second = largest(tokens - length, tiles - size[1])
                    used[first] -= 1
                    pairs.append((length + (second[0] if second else 0), first))
                    if pairs[-1][0] == tokens:
                        break
            size = max(pairs)[1]
    return row
