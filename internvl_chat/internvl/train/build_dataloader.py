"""Build the DataLoader of a rank: workers, prefetching, shared memory."""

import os
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from internvl.arguments.training import TrainingArguments
from internvl.dist_utils import count_cores_per_rank
from internvl.launchers import count_local_ranks
from internvl.planning.batch_sampler import PlanBatchSampler
from internvl.runtime.dataloader_workers import collate_in_shared_memory, limit_num_workers, start_worker


def build_dataloader(
    dataset: Dataset, sampler: PlanBatchSampler, collate_fn: Callable, args: TrainingArguments, max_batch_bytes: int
) -> DataLoader:
    """Build the DataLoader over a rank's batches.

    Args:
        max_batch_bytes: upper bound of a collated batch, which workers hand over in shared memory.
    """
    # The number of workers does not affect the data.
    num_workers = min(args.dataloader_num_workers, count_cores_per_rank())
    prefetch = args.dataloader_prefetch_factor or 2
    is_pinned = args.dataloader_pin_memory and torch.cuda.is_available()
    # The batches of this step and the next one. Pinned batches are copies.
    num_used = 2 if is_pinned else 2 * args.gradient_accumulation_steps
    num_workers = limit_num_workers(num_workers, prefetch, num_used, max_batch_bytes, count_local_ranks(os.environ))
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(collate_in_shared_memory, collate_fn),
        num_workers=num_workers,
        worker_init_fn=start_worker,
        prefetch_factor=prefetch if num_workers else None,
        multiprocessing_context=args.dataloader_multiprocessing_context if num_workers else None,
        # One iterator lasts for the run, whatever --dataloader_persistent_workers. torch 2.14 would end persistent
        # workers only when it collects the DataLoader, after waiting 5 s for each.
        persistent_workers=False,
        generator=torch.Generator(),  # for the workers' seeds, instead of the global generator
        pin_memory=is_pinned,
    )
