"""Settings of an evaluation, the same during training and afterwards."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

logger = logging.getLogger(__name__)


def log_skipped_samples(samples: list[str]) -> None:
    """Log each skipped sample."""
    for sample in samples:
        logger.warning("Skipped sample: %s", sample)


@dataclass(frozen=True)
class EvaluationSettings:
    """How the evaluation sets are run through the model.

    Attributes:
        max_tokens, max_tiles: limits of a packed row; a longer sample has a row of its own.
        batch_size: questions per batch of generation, on each rank.
        max_new_tokens: of an answer.
        num_samples: questions per set that are answered; None for all.
        image_mean, image_std: normalization of pixels.
        autocast_fn: context in which the model runs.
        check_stop_fn: called after every batch on all ranks; raises to abandon the evaluation.
        report_skipped_fn: called on all ranks with the samples that turned out to be unusable while they were loaded,
            each with its file, line and reason; raises if these are too many.
        num_workers: worker processes that load samples, on each rank; at most one per CPU core.
        multiprocessing_context: how workers start; None for Python's default.
    """

    max_tokens: int
    max_tiles: int
    batch_size: int
    max_new_tokens: int
    num_samples: int | None
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    autocast_fn: Callable[[], AbstractContextManager] = nullcontext
    check_stop_fn: Callable[[], None] = lambda: None
    report_skipped_fn: Callable[[list[str]], None] = log_skipped_samples
    num_workers: int = 0
    multiprocessing_context: str | None = None
