"""Private names of torch that this package uses.

`tests/test_torch_internals.py` fails with the private name when a new version of torch moves it.
"""

import re
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from packaging.version import Version

# Method of `torch.utils.data.dataloader._MultiProcessingDataLoaderIter` that waits for a worker. Seen in torch 2.14.
DATALOADER_WAIT_METHOD = "_try_get_data"
# Errors of collectives are plain RuntimeErrors (torch 2.14): only their text names the library that failed.
COLLECTIVE_ERROR_PATTERN = re.compile(r"gloo|nccl|ProcessGroup|TCPStore|c10d", re.IGNORECASE)


def list_process_groups() -> list[dist.ProcessGroup]:
    """List the process groups of this rank, those of libraries included.

    Reads `torch.distributed.distributed_c10d._world.pg_map`, seen in torch 2.14, which has no public list of groups.
    """
    # For a group that this rank is not in, torch has a placeholder object.
    return [group for group in dist.distributed_c10d._world.pg_map if isinstance(group, dist.ProcessGroup)]


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set the timeout of a process group's collectives.

    torch 2.11 has no `torch.distributed.set_timeout`, only `distributed_c10d._set_pg_timeout`.
    """
    if hasattr(dist, "set_timeout"):
        dist.set_timeout(timeout, group)
    else:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def destroy_process_groups() -> None:
    """Destroy all process groups of this rank.

    torch < 2.8 holds the GIL meanwhile, and waits for the threads of a gloo group. A thread that still frees a tensor
    of the last collective waits for the GIL: a deadlock. So it gets the time to finish.
    """
    if Version(torch.__version__) < Version("2.8"):
        time.sleep(0.5)
    dist.destroy_process_group()


def is_raised_in_dataloader_wait(error: BaseException) -> bool:
    """Check whether a DataLoader raised an error while waiting for workers."""
    return any(frame.f_code.co_name == DATALOADER_WAIT_METHOD for frame, _ in traceback.walk_tb(error.__traceback__))


def is_collective_error(error: BaseException) -> bool:
    """Check whether a collective failed, perhaps because of another rank."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(COLLECTIVE_ERROR_PATTERN.search(str(error)))
    )
