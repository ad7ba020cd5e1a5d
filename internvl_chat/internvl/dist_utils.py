"""Process groups: joined however a process was launched, and two ways to share results between ranks.

`init_dist` runs first in an entry point; afterwards torch, accelerate and DeepSpeed all read the same variables.
"""

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from internvl.launchers import check_address, free_port, launch_environment, port_in_use_error  # noqa: F401

timeout = timedelta(minutes=60)
COLLECTIVE_ERROR_WORDS = re.compile(
    r"gloo|nccl|ProcessGroup|TCPStore|c10d", re.IGNORECASE
)  # whose errors have no class


def init_dist(launcher: str | None = None, backend: str | None = None, **kwargs) -> None:
    """Join the process group that the launcher started.

    Args:
        launcher: `pytorch` (torchrun), `slurm` (srun) or `mpi`; None finds out from the environment, and a process that
            no launcher started becomes a world of one.
        backend: default `nccl` with CUDA and `gloo` without; `nccl` without CUDA falls to `gloo`.
        kwargs: passed to `torch.distributed.init_process_group`.

    Raises:
        ValueError: for an unknown launcher, or one whose variables are not set.
        OSError: rank 0's address is not known, or its port is not free.
    """
    os.environ.update(launch_environment(os.environ, launcher))
    check_address(os.environ["MASTER_ADDR"])
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not find out by itself, and warn
    if backend in (None, "nccl"):
        backend = "nccl" if has_cuda else "gloo"
    if not dist.is_initialized():
        try:
            dist.init_process_group(backend, **{"timeout": timeout, **kwargs})
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise port_in_use_error(os.environ["MASTER_PORT"]) from error


def is_collective_error(error: BaseException) -> bool:
    """Whether an error says that ranks did not come together, for which another of them may be to blame."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(COLLECTIVE_ERROR_WORDS.search(str(error)))
    )


def set_collective_timeout(limit: timedelta) -> None:
    """Let no group wait longer, those of libraries included, which have torch's own 10 minutes (nccl) or 30."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if isinstance(group, dist.ProcessGroup):
            dist.set_timeout(limit, group)


def init_deepspeed() -> None:
    """Put DeepSpeed on the process group that is there; ZeRO-3 needs it before a model is built."""
    import deepspeed

    deepspeed.init_distributed(dist.get_backend(), verbose=False)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def num_cores() -> int:
    """CPU cores for each rank of this node: of those that this process may use, its share."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def gather_objects(value: Any) -> list:
    """`value` of every rank, in rank order, on every rank. A collective: all ranks must call it."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_rank_0(make: Callable[[], Any]) -> Any:
    """Call `make` on rank 0 alone and hand its result, or its exception, to every rank."""
    if world_size() == 1:
        return make()
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:  # it is raised below, on every rank: otherwise the others would wait for ever
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result
