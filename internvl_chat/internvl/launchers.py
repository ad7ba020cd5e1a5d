"""Environment variables of torchrun, SLURM and Open MPI, translated to torchrun's.

No torch here, and no commands of the launchers: a compute node may lack both.
"""

import os
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple
from zlib import crc32


class Launcher(NamedTuple):
    """A launcher and the environment variables that it sets for each rank.

    Attributes:
        command: the command that starts ranks, for error messages.
        rank_variables: torchrun's variable -> this launcher's equivalent.
        node_list_variables: lists of nodes. Rank 0 runs on the first node of the first list that is set.
        job_variables: together they identify one job, or one step of a job.
    """

    command: str
    rank_variables: dict[str, str]
    node_list_variables: tuple[str, ...] = ()
    job_variables: tuple[str, ...] = ()


# In the order in which they are detected.
LAUNCHERS = {
    "pytorch": Launcher("torchrun", {"RANK": "RANK", "WORLD_SIZE": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_RANK"}),
    # Before slurm: inside an allocation mpirun starts one daemon per node with srun, and its ranks inherit that
    # daemon's SLURM variables.
    "mpi": Launcher(
        "mpirun",
        {
            "RANK": "OMPI_COMM_WORLD_RANK",
            "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
            "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
        },
        node_list_variables=("SLURM_JOB_NODELIST",),
        job_variables=("PMIX_NAMESPACE",),
    ),
    # Variables of the step come first: it may have fewer tasks than its job, or other nodes.
    "slurm": Launcher(
        "srun",
        {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"},
        node_list_variables=("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"),
        job_variables=("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    ),
}
DEFAULT_PORT = "29500"  # torchrun's
JOB_PORTS = range(20000, 30000)  # below the range from which systems take ports for outgoing connections


def launch_environment(env: Mapping[str, str], launcher: str | None = None) -> dict[str, str]:
    """Translate a launcher's variables to torchrun's.

    Args:
        env: the environment of this process.
        launcher: a key of LAUNCHERS; None detects it from `env`. Without a launcher the world size is 1.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Addresses and ports that `env` has are kept.

    Raises:
        ValueError: the launcher is unknown, its variables are not set, or none of them names rank 0's host.
    """
    if launcher is None:
        launcher = next(
            (name for name, candidate in LAUNCHERS.items() if not find_missing_variables(candidate, env)), None
        )
    if launcher is None:
        one_rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        return one_rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_port()}
    if launcher not in LAUNCHERS:
        raise ValueError(f"launcher {launcher!r} is not supported; expected one of {', '.join(LAUNCHERS)}.")
    selected = LAUNCHERS[launcher]
    if missing := find_missing_variables(selected, env):
        raise ValueError(
            f"launcher {launcher} requires {', '.join(missing)} in the environment; "
            f"was the program started by {selected.command}?"
        )
    translated = {name: env[launcher_name] for name, launcher_name in selected.rank_variables.items()}
    translated["MASTER_ADDR"] = env.get("MASTER_ADDR") or find_master_host(env, selected)
    translated["MASTER_PORT"] = env.get("MASTER_PORT") or choose_job_port(env, selected)
    return translated


def find_missing_variables(launcher: Launcher, env: Mapping[str, str]) -> list[str]:
    """List the launcher's rank variables that are not set."""
    return [name for name in launcher.rank_variables.values() if name not in env]


def find_master_host(env: Mapping[str, str], launcher: Launcher) -> str:
    """Find rank 0's host: the first node, or this one."""
    for name in launcher.node_list_variables:
        if env.get(name):
            return parse_first_node(env[name])
    if "OMPI_COMM_WORLD_SIZE" in env and env["OMPI_COMM_WORLD_SIZE"] != env.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        raise ValueError(
            "MASTER_ADDR is required when mpirun uses several hosts: mpirun -x MASTER_ADDR=HOST_OF_RANK_0."
        )
    return "127.0.0.1"


def parse_first_node(nodes: str) -> str:
    """Return the first host of a SLURM node list: `node[007-010,12],gpu-a` -> `node007`.

    A name may have several brackets, and a suffix after them.
    """
    first_item = re.match(r"(\[[^]]*\]|[^],[])*", nodes)  # up to a comma outside brackets
    assert first_item is not None  # the pattern matches the empty string, too
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first_item[0])  # each bracket becomes its first number


def choose_job_port(env: Mapping[str, str], launcher: Launcher) -> str:
    """Derive a port from the job's id.

    It is equal on all ranks and different for the next job. Before they are connected, ranks have no other way to
    agree on a port.
    """
    job_id = [env[name] for name in launcher.job_variables if name in env]
    return str(JOB_PORTS[crc32(" ".join(job_id).encode()) % len(JOB_PORTS)]) if job_id else DEFAULT_PORT


def find_free_port() -> str:
    """Find a TCP port of this host that no program listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def check_master_address(address: str) -> None:
    """Check that rank 0's host name resolves here.

    Raises:
        OSError: it does not resolve. torch would retry until its timeout instead.
    """
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise OSError(
            f"{os.uname().nodename} cannot resolve {address}, the host of rank 0 ({error.strerror}): "
            "set MASTER_ADDR to its address."
        ) from error


def make_port_in_use_error(port: str | int) -> OSError:
    """Create the error for a MASTER_PORT that is already in use."""
    return OSError(f"port {port} of {os.uname().nodename} is already in use: set MASTER_PORT to a free port.")
