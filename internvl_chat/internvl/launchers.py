"""What launchers tell the processes that they start, brought to torchrun's variables. No torch here, and no commands:
a compute node need not have any."""

import os
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple
from zlib import crc32


class Launcher(NamedTuple):
    """Where a launcher keeps what torchrun keeps in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."""

    command: str
    ranks: dict[str, str]  # torchrun's variable -> the launcher's
    nodes: tuple[str, ...] = ()  # node lists; rank 0 runs on the first node of the first list that is set
    job: tuple[str, ...] = ()  # together they are another job's for nobody


LAUNCHERS = {
    "pytorch": Launcher("torchrun", {"RANK": "RANK", "WORLD_SIZE": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_RANK"}),
    # Before slurm: mpirun in an allocation starts a daemon a node by srun, whose variables its processes inherit.
    "mpi": Launcher(
        "mpirun",
        {
            "RANK": "OMPI_COMM_WORLD_RANK",
            "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
            "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
        },
        nodes=("SLURM_JOB_NODELIST",),
        job=("PMIX_NAMESPACE",),
    ),
    # The step's variables: it may have fewer tasks, or other nodes, than its job.
    "slurm": Launcher(
        "srun",
        {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"},
        nodes=("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"),
        job=("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    ),
}
PORTS = range(20000, 30000)  # below those that systems take for outgoing connections


def launch_environment(env: Mapping[str, str], launcher: str | None = None) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as the launcher's own variables tell them.

    Raises:
        ValueError: for an unknown launcher, one whose variables are not set, or a world whose rank 0 is nowhere told.
    """
    if launcher is None:
        launcher = next((name for name, one in LAUNCHERS.items() if not missing_variables(one, env)), None)
    if launcher is None:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        return alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    if launcher not in LAUNCHERS:
        raise ValueError(f"unknown launcher {launcher!r}; known are {', '.join(LAUNCHERS)}.")
    names = LAUNCHERS[launcher]
    if lacking := missing_variables(names, env):
        raise ValueError(
            f"launcher {launcher} needs {', '.join(lacking)} in the environment; was it started by {names.command}?"
        )
    found = {ours: env[theirs] for ours, theirs in names.ranks.items()}
    found["MASTER_ADDR"] = env.get("MASTER_ADDR") or first_host(env, names)
    found["MASTER_PORT"] = env.get("MASTER_PORT") or job_port(env, names)
    return found


def missing_variables(launcher: Launcher, env: Mapping[str, str]) -> list[str]:
    return [name for name in launcher.ranks.values() if name not in env]


def first_host(env: Mapping[str, str], launcher: Launcher) -> str:
    """Where rank 0 runs: on the first node of the launcher's list, or here if all ranks do."""
    for name in launcher.nodes:
        if env.get(name):
            return first_node(env[name])
    if "OMPI_COMM_WORLD_SIZE" in env and env["OMPI_COMM_WORLD_SIZE"] != env.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        raise ValueError("mpirun on several machines does not tell where rank 0 runs: mpirun -x MASTER_ADDR=ITS_HOST.")
    return "127.0.0.1"


def first_node(nodes: str) -> str:
    """`node[007-010,12],gpu-a` -> `node007`; a name may have several brackets, and something behind them."""
    name = re.match(r"(\[[^]]*\]|[^],[])*", nodes)[0]
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", name)


def job_port(env: Mapping[str, str], launcher: Launcher) -> str:
    """The same for all ranks, which have no other way to agree on one, and another for the next job on a node."""
    told = [env[name] for name in launcher.job if name in env]
    return str(PORTS[crc32(" ".join(told).encode()) % len(PORTS)]) if told else "29500"


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def check_address(address: str) -> None:
    """Raises an OSError if this machine does not know where rank 0 runs: torch would ask until its timeout."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise OSError(
            f"{os.uname().nodename} finds no address of {address}, where rank 0 runs ({error.strerror}): "
            "set MASTER_ADDR to one."
        ) from error


def port_in_use_error(port: str | int) -> OSError:
    """For rank 0, which is to listen there."""
    return OSError(
        f"port {port} of {os.uname().nodename} is taken by another program: set MASTER_PORT to one that is free."
    )
