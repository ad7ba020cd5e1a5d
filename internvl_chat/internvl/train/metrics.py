"""What a logging step reports beside the loss: how fast the run goes."""

import time
from dataclasses import dataclass, field


@dataclass
class Throughput:
    """Counts what one rank trained on since the last report."""

    tokens: int = 0
    tiles: int = 0
    since: float = field(default_factory=time.perf_counter)

    def count(self, tokens: int, tiles: int) -> None:
        self.tokens += tokens
        self.tiles += tiles

    def take(self) -> tuple[int, int, float]:
        """(tokens, tiles, seconds) since the last call; starts anew."""
        now = time.perf_counter()
        taken = self.tokens, self.tiles, now - self.since
        self.tokens, self.tiles, self.since = 0, 0, now
        return taken


def rates(reports: list[tuple[int, int, float]]) -> dict[str, float]:
    """Tokens and tiles a second of all ranks together, from each rank's `take()`."""
    seconds = max(seconds for _, _, seconds in reports)
    return {
        "tokens_per_second": round(sum(tokens for tokens, _, _ in reports) / seconds, 1),
        "tiles_per_second": round(sum(tiles for _, tiles, _ in reports) / seconds, 1),
    }
