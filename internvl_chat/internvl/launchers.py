"""Environment variables of torchrun, SLURM and Open MPI, translated to torchrun's, and the connection to rank 0.

No torch here, and no commands of the launchers: a compute node may lack both.
"""

import contextlib
import os
import re
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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
MIN_ADDRESS_SPACE = 4 << 30  # bytes of virtual memory in which torch can be imported, for `ulimit -v`
NOTICE_SECONDS, NOTICE_INTERVAL = 10.0, 60.0  # until the first notice about ranks that are missing; between notices
JOB_PORTS = range(20000, 30000)  # below the range from which systems take ports for outgoing connections


def launch_environment(env: Mapping[str, str], launcher: str | None = None) -> dict[str, str]:
    """Translate a launcher's variables to torchrun's.

    Args:
        env: the environment of this process.
        launcher: a key of LAUNCHERS; None detects it from `env`. Without a launcher the world size is 1.

    Returns:
        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Addresses and ports that `env` has are kept.

    Raises:
        ValueError: the launcher is unknown, its variables are not set or invalid, or none of them names rank 0's host.
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
    rank, world_size = (
        require_integer(selected.rank_variables[name], translated[name]) for name in ("RANK", "WORLD_SIZE")
    )
    require_integer(selected.rank_variables["LOCAL_RANK"], translated["LOCAL_RANK"])
    if rank >= world_size:
        names = selected.rank_variables
        raise ValueError(f"{names['RANK']}={rank} is invalid: expected less than {names['WORLD_SIZE']}={world_size}.")
    validate_port("MASTER_PORT", translated["MASTER_PORT"])
    return translated


def require_integer(name: str, value: str) -> int:
    """Convert a variable to an integer >= 0."""
    if not re.fullmatch(r"\d{1,9}", value, re.ASCII):
        raise ValueError(f"{name}={value!r:.80} is invalid: expected an integer >= 0.")
    return int(value)


def validate_port(name: str, value: str) -> None:
    """Raise a ValueError if a variable is not a TCP port."""
    if not 1 <= require_integer(name, value) <= 65535:
        raise ValueError(f"{name}={value} is invalid: expected a port from 1 to 65535.")


def validate_environment(env: Mapping[str, str]) -> None:
    """Raise a ValueError if a variable that libraries read is invalid.

    They would print C++ frames, or ignore it. The same for a limit of memory in which torch cannot be imported.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < MIN_ADDRESS_SPACE:
        raise ValueError(
            f"`ulimit -v` {limit >> 10} is too low: expected unlimited, or at least {MIN_ADDRESS_SPACE >> 10} KB."
        )
    if (threads := env.get("OMP_NUM_THREADS")) and not re.fullmatch(r"0*[1-9]\d*(,0*[1-9]\d*)*", threads.strip()):
        raise ValueError(f"OMP_NUM_THREADS={threads!r:.80} is invalid: expected an integer >= 1.")
    devices = (env.get("CUDA_VISIBLE_DEVICES") or "NoDevFiles").split(",")  # NoDevFiles: SLURM's value for no GPU
    if not all(re.fullmatch(r"-?\d+|(GPU|MIG)-\S+|NoDevFiles|", device.strip()) for device in devices):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={','.join(devices)!r:.80} is invalid: expected numbers or UUIDs of GPUs, as "
            "`nvidia-smi -L` prints them, or an empty value for none."
        )
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = env.get(variable, "")
        # NCCL takes prefixes of names; `=` before exact names, `^` before those to exclude.
        is_exact = variable.startswith("GLOO") or value.startswith("=")
        names = tuple(value.removeprefix("=").split(","))
        found = [name for name in interfaces if (name in names if is_exact else name.startswith(names))]
        if value and not found and not value.startswith("^"):
            raise ValueError(
                f"{variable}={value!r:.80} is invalid: {os.uname().nodename} has no such network interface, only "
                f"{', '.join(interfaces)}."
            )


def count_local_ranks(env: Mapping[str, str]) -> int:
    """Count the ranks on this node."""
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if counts := re.findall(r"(\d+)(?:\(x\d+\))?", env.get(name, "")):  # SLURM: 8(x3),2
            return max(map(int, counts))
    return 1


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


def wait_for_rank_0(address: str, port: str | int, seconds: float, waiting: str) -> None:
    """Wait until rank 0 listens; torch would print C++ frames meanwhile.

    Args:
        waiting: who waits, such as "node 1 of 2".

    Raises:
        OSError: it did not listen within `seconds`.
    """
    deadline, reason = time.monotonic() + seconds, ""
    with announce_waiting(lambda: f"{waiting} waits for rank 0 at {address}:{port}: {reason}"):
        while True:
            try:
                socket.create_connection((address, int(port)), timeout=5).close()
                return
            except OSError as error:
                reason = error.strerror or str(error)
            if time.monotonic() > deadline:
                raise OSError(
                    f"{waiting} did not reach rank 0 at {address}:{port} within {seconds:.0f} s ({reason}): start it "
                    "there, or set MASTER_ADDR and MASTER_PORT to its address."
                )
            time.sleep(0.5)


@contextlib.contextmanager
def announce_waiting(describe_fn: Callable[[], str]) -> Iterator[None]:
    """Print who waits for whom while the body runs."""
    is_done = threading.Event()

    def announce() -> None:
        seconds = NOTICE_SECONDS
        while not is_done.wait(seconds) and (notice := describe_fn()):
            print(notice, file=sys.stderr, flush=True)
            seconds = NOTICE_INTERVAL

    threading.Thread(target=announce, daemon=True).start()
    try:
        yield
    finally:
        is_done.set()


def describe_connected_hosts(port: str | int) -> str:
    """Describe the other hosts that are connected to a port of this process."""
    import psutil

    connections = psutil.Process().net_connections("tcp")
    own = {connection.laddr.ip for connection in connections}
    remote = {one.raddr.ip for one in connections if one.raddr and one.laddr.port == int(port)} - own
    return f"connected: {', '.join(sorted(remote)).replace('::ffff:', '') or 'none of the others'}"


def make_port_in_use_error(port: str | int) -> OSError:
    """Create the error for a MASTER_PORT that is already in use."""
    return OSError(f"port {port} of {os.uname().nodename} is already in use: set MASTER_PORT to a free port.")
