"""Process groups: every launcher's environment brought to torchrun's, and two ways to share results between ranks.

`init_dist` runs first in an entry point; afterwards torch, accelerate and DeepSpeed all read the same variables.
"""

import os
import socket
import subprocess
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

timeout = timedelta(minutes=60)

# launcher -> torchrun's variable -> where the launcher keeps it
LAUNCHERS: dict[str, dict[str, str]] = {
    "pytorch": {"RANK": "RANK", "WORLD_SIZE": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_RANK"},
    "slurm": {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"},
    "mpi": {
        "RANK": "OMPI_COMM_WORLD_RANK",
        "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    },
}


def init_dist(launcher: str | None = None, backend: str | None = None, **kwargs) -> None:
    """Join the process group that the launcher started.

    Args:
        launcher: `pytorch` (torchrun), `slurm` (srun) or `mpi`; None finds out from the environment, and a process that
            no launcher started becomes a world of one.
        backend: default `nccl` with CUDA and `gloo` without; `nccl` without CUDA falls to `gloo`.
        kwargs: passed to `torch.distributed.init_process_group`.

    Raises:
        ValueError: for an unknown launcher, or one whose variables are not set.
    """
    os.environ.update(launch_environment(os.environ, launcher))
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not find out by itself, and warn
    if backend in (None, "nccl"):
        backend = "nccl" if has_cuda else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, **{"timeout": timeout, **kwargs})


def limit_waiting(limit: timedelta) -> None:
    """Let no group wait longer, those of libraries included, which have torch's own 10 minutes (nccl) or 30."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if isinstance(group, dist.ProcessGroup):
            dist.set_timeout(limit, group)


def init_deepspeed() -> None:
    """Put DeepSpeed on the process group that is there; ZeRO-3 needs it before a model is built."""
    import deepspeed

    deepspeed.init_distributed(dist.get_backend(), verbose=False)


def launch_environment(env: Mapping[str, str], launcher: str | None = None) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as the launcher's own variables tell them."""
    if launcher is None:
        launcher = next((name for name, names in LAUNCHERS.items() if names["RANK"] in env), None)
    if launcher is None:
        return {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
    if launcher not in LAUNCHERS:
        raise ValueError(f"unknown launcher {launcher!r}; known are {', '.join(LAUNCHERS)}.")
    names = LAUNCHERS[launcher]
    missing = [name for name in names.values() if name not in env]
    if missing:
        raise ValueError(
            f"launcher {launcher} needs {', '.join(missing)} in the environment; was it started by {launcher}?"
        )
    found = {ours: env[theirs] for ours, theirs in names.items()}
    found["MASTER_ADDR"] = env.get("MASTER_ADDR") or first_host(env)
    found["MASTER_PORT"] = env.get("MASTER_PORT") or "29500"
    return found


def first_host(env: Mapping[str, str]) -> str:
    """The first node of a SLURM allocation; this machine where there is none."""
    nodes = env.get("SLURM_NODELIST")
    if not nodes:
        return "127.0.0.1"
    return subprocess.run(
        ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True
    ).stdout.split()[0]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(value: Any) -> list:
    """`value` of every rank, in rank order, on every rank. A collective: all ranks must call it."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first_rank(make: Callable[[], Any]) -> Any:
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
