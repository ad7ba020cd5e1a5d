"""Run evaluation samples through a model, on all ranks, and gather a result for each."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from internvl.data.collators import LIST_KEYS, TILE_KEYS, collate_rows, move_batch
from internvl.data.preference_dataset import TOKEN_KEYS
from internvl.dist_utils import count_cores_per_rank, gather_objects, get_rank
from internvl.evaluation.evaluation_data import EvaluationData
from internvl.evaluation.model_mode import evaluation_mode
from internvl.evaluation.settings import EvaluationSettings
from internvl.model.internvl_chat import InternVLChatModel
from internvl.planning.batch_sampler import compute_max_batch_bytes
from internvl.planning.epoch_plan import EpochPlan
from internvl.progress import Progress
from internvl.runtime.dataloader_workers import build_worker_loader
from internvl.runtime.signals import preemption


def measure_samples(
    model: InternVLChatModel,
    data: EvaluationData,
    settings: EvaluationSettings,
    plan: EpochPlan,
    collate_fn: Callable[[Sequence[dict]], dict],
    measure_fn: Callable[[dict], np.ndarray],
    dtype: np.dtype,
) -> np.ndarray:
    """Measure all samples of a plan. A collective.

    Args:
        plan: its steps have no gradient accumulation.
        collate_fn: items of `data.dataset`, of one sample each, to a batch.
        measure_fn: batch on the model's device -> results of its usable samples, of `dtype`. All ranks call it equally
            often, with a batch without samples if need be.

    Returns:
        (N,) of `dtype`, equal on all ranks; zeros where a sample is not in the plan, or has turned out to be unusable.
    """
    batches = [
        [sample for row in rows for sample in plan.get_row_samples(row)]
        for rows in plan.steps[:, 0, get_rank()].tolist()
    ]
    max_batch_bytes = compute_max_batch_bytes(plan, data.lengths, data.dataset.datasets[0].data_args.force_image_size)
    loader = build_worker_loader(
        data.dataset,
        [[(0, sample) for sample in samples] or [(0,)] for samples in batches],
        partial(collate_samples, collate_fn),
        num_workers=min(settings.num_workers, count_cores_per_rank(), len(batches)),
        max_batch_bytes=max_batch_bytes,
        multiprocessing_context=settings.multiprocessing_context,
        is_pinned=torch.cuda.is_available(),
    )
    measured, results, skipped = [], [np.zeros(0, dtype)], []
    with evaluation_mode(model):
        for samples, batch in zip(batches, wait_for_batches(loader, "Measuring losses"), strict=True):
            skipped += batch.pop("bad_samples")
            is_usable = batch.pop("is_usable")
            measured += [sample for sample, usable in zip(samples, is_usable, strict=False) if usable]
            with settings.autocast_fn():
                batch = move_batch(batch, model.device, settings.image_mean, settings.image_std)
                results.append(measure_fn(batch))
            settings.check_stop_fn()
    all_results, all_skipped = np.zeros(len(data.lengths), dtype), []
    for measured_on_rank, results_of_rank, skipped_on_rank in gather_objects(
        (measured, np.concatenate(results), skipped)
    ):
        all_results[measured_on_rank] = results_of_rank
        all_skipped += skipped_on_rank
    settings.report_skipped_fn(all_skipped)
    return all_results


def collate_samples(collate_fn: Callable[[Sequence[dict]], dict], samples: Sequence[dict]) -> dict:
    """Collate single samples; add which of them are usable."""
    return collate_fn(samples) | {"is_usable": [bool(sample["documents"]) for sample in samples]}


def collate_packed(samples: Sequence[dict], pad_id: int = 0, image_token_id: int | None = None) -> dict:
    """Collate single samples to one packed row."""
    usable = [sample for sample in samples if sample["documents"]] or samples[:1]
    row = {key: torch.cat([sample[key] for sample in usable]) for key in (*TOKEN_KEYS, *TILE_KEYS)}
    lists = {key: [entry for sample in samples for entry in sample[key]] for key in LIST_KEYS}
    return collate_rows([row | lists], pad_id, image_token_id=image_token_id)


def wait_for_batches(loader: DataLoader, description: str, is_shown: bool = True) -> Iterator[dict]:
    """Yield the batches of a DataLoader; show the progress on rank 0."""
    batches = iter(loader)
    with Progress(len(loader), description, "batch", is_shown=is_shown and get_rank() == 0) as progress:
        while True:
            with preemption.waiting_for_data():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            progress.update()
