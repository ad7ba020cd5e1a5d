"""Build the DataLoader of a rank from the flags."""

from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Dataset

from internvl.arguments.training import TrainingArguments
from internvl.dist_utils import count_cores_per_rank
from internvl.planning.batch_sampler import PlanBatchSampler
from internvl.runtime.dataloader_workers import build_worker_loader


def build_dataloader(
    dataset: Dataset, sampler: PlanBatchSampler, collate_fn: Callable, args: TrainingArguments, max_batch_bytes: int
) -> DataLoader:
    """Build the DataLoader over a rank's batches.

    Args:
        max_batch_bytes: upper bound of a collated batch.
    """
    is_pinned = args.dataloader_pin_memory and torch.cuda.is_available()
    return build_worker_loader(
        dataset,
        sampler,
        collate_fn,
        num_workers=min(args.dataloader_num_workers, count_cores_per_rank()),
        max_batch_bytes=max_batch_bytes,
        prefetch_factor=args.dataloader_prefetch_factor,
        num_prefetched=args.gradient_accumulation_steps,  # a step begins by taking all of its batches
        # The batches of this step and the next one. Pinned batches are copies.
        num_used=2 if is_pinned else 2 * args.gradient_accumulation_steps,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),  # a flag from 5.17 on
        is_pinned=is_pinned,
    )
