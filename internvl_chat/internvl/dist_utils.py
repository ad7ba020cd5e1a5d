"""Process groups: join one under any launcher, exchange objects between ranks.

`init_dist` runs first in an entry point. Afterwards torch, accelerate and DeepSpeed all read the same variables.
"""

import contextlib
import io
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from internvl.launchers import (
    announce_waiting,
    check_master_address,
    describe_connected_hosts,
    launch_environment,
    make_port_in_use_error,
    validate_environment,
    wait_for_rank_0,
)
from internvl.torch_internals import is_collective_error as is_collective_error
from internvl.torch_internals import list_process_groups, set_group_timeout

timeout = timedelta(minutes=60)  # upstream's name; the default of --ddp_timeout


def init_dist(launcher: str | None = None, backend: str | None = None, **kwargs) -> None:
    """Join the process group that the launcher started.

    Args:
        launcher: `pytorch` (torchrun), `slurm` (srun) or `mpi`. None detects it from the environment. Without a
            launcher the world size is 1.
        backend: defaults to `nccl` with CUDA and to `gloo` without; `nccl` without CUDA falls back to `gloo`.
        kwargs: passed to `torch.distributed.init_process_group`.

    Raises:
        ValueError: the launcher is unknown, or its variables are not set.
        OSError: rank 0's address is unknown, or its port is in use.
    """
    validate_environment(os.environ)
    os.environ.update(launch_environment(os.environ, launcher))
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check_master_address(address)
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        require_no_gpus()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed probes for an accelerator, and warns
        # DeepSpeed imports this module, which warns on a machine with the CUDA toolkit and without a GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if backend in (None, "nccl"):
        backend = "nccl" if has_cuda else "gloo"
    if not dist.is_initialized():
        options: dict[str, Any] = {"timeout": timeout, **kwargs}
        if backend == "nccl":  # else collectives guess the device, and a GPU used by two ranks is found much later
            options.setdefault("device_id", torch.device("cuda", torch.cuda.current_device()))
        if rank > 0:
            wait_for_rank_0(address, port, options["timeout"].total_seconds(), f"rank {rank} of {world_size}")
        try:
            with announce_waiting(lambda: describe_waiting(rank, world_size, port)):
                dist.init_process_group(backend, **options)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise make_port_in_use_error(port) from error


def describe_waiting(rank: int, world_size: int, port: str) -> str:
    """Describe which ranks a rank waits for."""
    connected = f"; {describe_connected_hosts(port)}" if rank == 0 else ""
    return f"rank {rank} waits for all {world_size} ranks to start{connected}"


def require_no_gpus(driver_dir: str = "/proc/driver/nvidia/gpus") -> None:
    """Raise a ValueError if CUDA sees none of this machine's GPUs.

    CUDA_VISIBLE_DEVICES may be empty, or -1, to hide them.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    is_hidden = visible is not None and visible.strip() in ("", "-1", "NoDevFiles")
    if torch.version.cuda and not is_hidden and os.path.isdir(driver_dir) and os.listdir(driver_dir):
        name = "CUDA" if visible is None else f"CUDA_VISIBLE_DEVICES={visible}: CUDA"
        raise ValueError(
            f"{name} finds no GPU, but this machine has {len(os.listdir(driver_dir))}: compare with `nvidia-smi -L`, "
            "or set CUDA_VISIBLE_DEVICES= to train on the CPU."
        )


def set_collective_timeout(limit: timedelta) -> None:
    """Set the timeout of all process groups, those of libraries included.

    Groups that DeepSpeed or accelerate create have torch's default, 10 minutes (nccl) or 30, instead of --ddp_timeout.
    """
    for group in list_process_groups():
        set_group_timeout(group, limit)


def init_deepspeed() -> None:
    """Initialize DeepSpeed on the existing process group.

    ZeRO-3 needs it before a model is built.
    """
    import deepspeed

    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed 0.19.8 prints a line for an op on CPUs
        deepspeed.init_distributed(dist.get_backend(), verbose=False)


def get_rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def count_cores_per_rank() -> int:
    """Count the CPU cores of each rank.

    Those that this process may use, divided by the number of ranks on this node.
    """
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def gather_objects(value: Any) -> list:
    """Gather `value` from all ranks, in rank order. A collective."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_rank_0(make_fn: Callable[[], Any]) -> Any:
    """Call `make_fn` on rank 0; broadcast its result. A collective.

    Every rank returns the result, or raises the exception.
    """
    if get_world_size() == 1:
        return make_fn()
    outcome: list[Any] = [None, None]
    if get_rank() == 0:
        try:
            outcome[0] = make_fn()
        except Exception as error:  # raised below on every rank: otherwise the others would wait for the broadcast
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result
