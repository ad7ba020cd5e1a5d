"""Settings of an evaluation, the same during training and afterwards."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.evaluation import EvaluationArguments

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

    @classmethod
    def from_flags(
        cls,
        data_args: DataTrainingArguments,
        args: EvaluationArguments,
        batch_size: int,
        normalization: tuple[Sequence[float], Sequence[float]],
        **options: Any,
    ) -> "EvaluationSettings":
        """Build the settings of a run from its flags.

        Args:
            batch_size: `--per_device_eval_batch_size`.
            normalization: mean and standard deviation of pixels.
            options: the attributes that have a default.
        """
        mean, std = normalization
        return cls(
            max_tokens=data_args.max_packed_tokens,
            max_tiles=data_args.num_images_expected,
            batch_size=batch_size,
            max_new_tokens=args.eval_max_new_tokens,
            num_samples=args.eval_num_samples,
            image_mean=tuple(mean),
            image_std=tuple(std),
            **options,
        )
