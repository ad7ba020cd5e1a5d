"""DataLoader workers: start, end, and the shared memory through which they send batches."""

import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from internvl.constants import HOW_TO_ENLARGE, SHARED_MEMORY_DIR
from internvl.launchers import count_local_ranks
from internvl.runtime.parent import exit_with_parent
from internvl.runtime.signals import ignore_first_sigterm

logger = logging.getLogger(__name__)
PAGE_BYTES = 8 * 4096  # lost by rounding the tensors of a batch up to pages
USABLE_SHARE = 0.8  # of its free bytes: NCCL has buffers there, too
MIN_PREFETCH_FACTOR = 2  # batches that a worker prepares ahead, unless the user says otherwise


class SpawnableDataset(Dataset):
    """Dataset that spawned workers load from a temporary file.

    A spawned process reads its pickled arguments from a pipe, whose other end its parent keeps open as well. If the
    process dies while it imports, a parent with more than 64 KB of arguments writes to the pipe forever (Python 3.14).
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @cached_property
    def file(self):
        """Temporary file with the pickled dataset."""
        file = tempfile.NamedTemporaryFile(prefix="dataset-")  # noqa: SIM115
        file.write(ForkingPickler.dumps(self.dataset))
        file.flush()
        return file

    def __getstate__(self) -> str:
        return self.file.name

    def __setstate__(self, path: str) -> None:
        # As multiprocessing reads arguments. Only this user can write to the file.
        self.dataset = ForkingPickler.loads(Path(path).read_bytes())


def build_worker_loader(
    dataset: Dataset,
    batches: Iterable[list],
    collate_fn: Callable[[Sequence[dict]], dict],
    *,
    num_workers: int,
    max_batch_bytes: int,
    prefetch_factor: int | None = None,
    num_prefetched: int = 0,
    num_used: int = 2,
    multiprocessing_context: str | None = None,
    is_pinned: bool = False,
) -> DataLoader:
    """Build a DataLoader that draws no global random numbers.

    Args:
        batches: the keys in `dataset` of each batch.
        num_workers: at most; there are fewer if shared memory is too small. Their number does not affect the data.
        max_batch_bytes: upper bound of a collated batch, which workers hand over in shared memory.
        prefetch_factor: batches that each worker prepares ahead; by default `choose_prefetch_factor`.
        num_prefetched: batches that all workers together should prepare ahead.
        num_used: batches that the caller still uses while workers load others.
        is_pinned: copy batches to pinned memory.
    """
    local_ranks = count_local_ranks(os.environ)
    if prefetch_factor is None:
        prefetch_factor = choose_prefetch_factor(num_workers, num_prefetched, num_used, max_batch_bytes, local_ranks)
    num_workers = limit_num_workers(num_workers, prefetch_factor, num_used, max_batch_bytes, local_ranks)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(collate_in_shared_memory, collate_fn),
        num_workers=num_workers,
        worker_init_fn=start_worker,
        prefetch_factor=prefetch_factor if num_workers else None,
        multiprocessing_context=multiprocessing_context if num_workers else None,
        # An iterator is used only once, whatever --dataloader_persistent_workers. torch 2.14 would end persistent
        # workers only when it collects the DataLoader, after waiting 5 s for each.
        persistent_workers=False,
        generator=torch.Generator(),  # for the workers' seeds, instead of the global generator
        pin_memory=is_pinned,
    )


def start_worker(worker_id: int) -> None:
    """Prepare a worker (a `worker_init_fn`)."""
    exit_with_parent()
    ignore_first_sigterm(worker_id)


def collate_in_shared_memory(collate_fn: Callable, rows: Sequence[dict]) -> dict:
    """Collate rows; in a worker, move the batch to shared memory.

    torch would move it in another thread of the worker. That thread prints an error, such as a full /dev/shm, and drops
    the batch, for which the rank then waits forever (torch 2.14, Python 3.13).
    """
    batch = collate_fn(rows)
    if get_worker_info() is not None:
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                _share(value)
    return batch


def _share(tensor: torch.Tensor) -> None:
    try:
        tensor.share_memory_()
    except RuntimeError as error:
        if "No space left" not in str(error):
            raise
        raise OSError(
            f"{SHARED_MEMORY_DIR} is full, through which dataloader workers send batches: enlarge it "
            f"({HOW_TO_ENLARGE}; under SLURM it counts as memory of the job, --mem), or set fewer "
            "--dataloader_num_workers."
        ) from error


def choose_prefetch_factor(
    num_workers: int, num_prefetched: int, num_used: int, batch_bytes: int, num_local_ranks: int
) -> int:
    """Choose how many batches each worker prepares ahead.

    All workers together prepare `num_prefetched`, or what fits into shared memory; each at least MIN_PREFETCH_FACTOR.
    The other arguments are those of `limit_num_workers`.
    """
    num_workers = max(1, num_workers)
    num_fitting = count_fitting_batches(batch_bytes, num_local_ranks) - num_used
    return max(MIN_PREFETCH_FACTOR, int(min(-(-num_prefetched // num_workers), num_fitting / num_workers)))


def count_fitting_batches(batch_bytes: int, num_local_ranks: int) -> float:
    """Count the batches of a rank that fit into shared memory."""
    if sys.platform != "linux":
        return math.inf
    return _count_free_bytes() * USABLE_SHARE / num_local_ranks // (batch_bytes + PAGE_BYTES)


def _count_free_bytes() -> int:
    return shutil.disk_usage(SHARED_MEMORY_DIR).free if os.access(SHARED_MEMORY_DIR, os.W_OK) else 0


def limit_num_workers(
    num_workers: int, prefetch_factor: int, num_used: int, batch_bytes: int, num_local_ranks: int
) -> int:
    """Reduce the number of workers to what fits into shared memory, with a warning.

    Their number does not change the training.

    Args:
        num_used: batches that a rank has taken from its workers and still uses.
        batch_bytes: size of the largest batch.
        num_local_ranks: ranks on this machine, which share the memory.
    """
    num_batches = num_workers * prefetch_factor + num_used
    num_fitting = (count_fitting_batches(batch_bytes, num_local_ranks) - num_used) / prefetch_factor
    num_fitting = int(max(0, min(num_workers, num_fitting)))
    if num_fitting < num_workers:
        batch_bytes += PAGE_BYTES
        logger.warning(
            "Dataloader workers per rank: %d instead of %d. %s has %s free; %d batches of up to %s on each of %d ranks "
            "need %s. To use all workers, enlarge it (%s).",
            *(num_fitting, num_workers, SHARED_MEMORY_DIR, _format_megabytes(_count_free_bytes()), num_batches),
            *(_format_megabytes(batch_bytes), num_local_ranks),
            *(_format_megabytes(num_batches * batch_bytes * num_local_ranks), HOW_TO_ENLARGE),
        )
    return num_fitting


def _format_megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2g} MB"
