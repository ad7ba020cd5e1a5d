"""Report system, memory, compilers, folders and launcher of this machine; nothing here imports a library."""

import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from internvl.constants import SHARED_MEMORY_DIR
from internvl.data.disk_cache import get_cache_dir
from internvl.launchers import LAUNCHERS, find_missing_variables, validate_environment

GIB = 2**30
MIN_SHM_GIB = 1.0  # per GPU; Docker's default of 64 MB holds a fraction of a batch
COMMAND_TIMEOUT = 30.0  # seconds for nvidia-smi and compilers
# Limit of memory of this process's control group, in version 2 and 1 of control groups.
MEMORY_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# What shows that this process runs in a container: a file or an environment variable.
CONTAINERS = {
    "Docker": "/.dockerenv",
    "Podman": "/run/.containerenv",
    "Kubernetes": "KUBERNETES_SERVICE_HOST",
    "Apptainer": "APPTAINER_CONTAINER",
}
# The only environment variables that are shown. None of them holds a password, a token or an address.
SHOWN_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "TORCH_CUDA_ARCH_LIST", "DS_ACCELERATOR"),
    *("NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_NET", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"),
    *("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    *("INTERNVL_CACHE", "INTERNVL_VENV", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"),
    *("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TMPDIR", "CC", "CXX", "PYTHONPATH", "LD_LIBRARY_PATH"),
    *("LAUNCHER", "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK"),
    *("SLURM_GPUS_ON_NODE", "SLURM_MEM_PER_NODE", "SLURM_STEP_NUM_TASKS"),
)


class Folder(NamedTuple):
    """A folder that runs write to.

    Attributes:
        find: returns its path for the environment variables.
        remedy: how another folder is chosen.
        cost: what does not work if it cannot be written.
        is_required: for every training.
        min_free_gib: below, there is a warning.
    """

    find: Callable[[Mapping[str, str]], str | Path]
    remedy: str
    cost: str
    is_required: bool = False
    min_free_gib: float = 1.0


def find_hub_cache(env: Mapping[str, str]) -> str:
    """Return the folder of huggingface_hub's downloads."""
    home = env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return env.get("HF_HUB_CACHE") or f"{home}/hub"


FOLDERS = {
    "sample lengths": Folder(
        lambda env: get_cache_dir(), "set INTERNVL_CACHE", "samples cannot be measured before training", True
    ),
    "temporary": Folder(lambda env: tempfile.gettempdir(), "set TMPDIR", "dataloader workers cannot start", True),
    "hub models": Folder(find_hub_cache, "set HF_HOME", "models cannot be downloaded by ORG/NAME", min_free_gib=5.0),
    "DeepSpeed ops": Folder(
        lambda env: env.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions",
        "set TORCH_EXTENSIONS_DIR",
        "--deepspeed is an error, and the recipes need ZERO_CONFIG=none",
    ),
    "Triton kernels": Folder(
        lambda env: env.get("TRITON_CACHE_DIR") or "~/.triton/cache",
        "set TRITON_CACHE_DIR",
        "--use_liger True and --compile True fail on a GPU",
    ),
}
OUTPUT_FOLDER = Folder(lambda env: "", "set --output_dir", "checkpoints cannot be saved", True, min_free_gib=5.0)


# -- system and memory -------------------------------------------------------------------------------------------------


def describe_system() -> dict[str, str]:
    """Return Python, the operating system and the container."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):  # not Linux, or a container without this file
        name = platform.system()
    containers = [name for name, sign in CONTAINERS.items() if sign in os.environ or os.path.exists(sign)]
    libc = " ".join(platform.libc_ver()).strip() or "not glibc"
    return {
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{name}, {platform.system()} {platform.release()}, {platform.machine()}, {libc}",
        "container": ", ".join(containers) or "none found",
    }


def describe_host() -> dict[str, Any]:
    """Return cores, memory and shared memory in GiB, and limits of this process."""
    found: dict[str, Any] = {"cpu_cores": len(os.sched_getaffinity(0))}
    found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
    limit = read_memory_limit()
    if limit and limit < found["memory_gib"]:
        found["memory_limit_gib"] = limit
    if Path(SHARED_MEMORY_DIR).is_dir():
        found["dev_shm_gib"] = round(shutil.disk_usage(SHARED_MEMORY_DIR).total / GIB, 2)
    found["open_files"] = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]  # InfiniBand registers its buffers as locked memory
    found["locked_memory"] = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked >> 10} KiB"
    return found


def read_memory_limit() -> float | None:
    """Return the memory limit of this process's control group in GiB, None without one."""
    for file in MEMORY_LIMIT_FILES:
        try:
            return round(int(Path(file).read_text()) / GIB, 1)
        except (OSError, ValueError):  # "max": no limit
            continue
    return None


# -- compilers ---------------------------------------------------------------------------------------------------------


def describe_compilers() -> dict[str, str]:
    """Return the first lines of the compilers' versions, empty for those that are missing.

    DeepSpeed compiles ops with the C++ compiler, and Triton calls the C compiler. Both need Python's headers.
    """
    commands = {
        "c++": os.environ.get("CXX") or "c++",
        "cc": os.environ.get("CC") or shutil.which("gcc") or "clang",  # as Triton looks for it
        "nvcc": "nvcc",
    }
    found = {name: run_command([*command.split(), "--version"]).splitlines() for name, command in commands.items()}
    header = Path(sysconfig.get_path("include"), "Python.h")
    return {
        "c++": found["c++"][0] if found["c++"] else "",
        "cc": found["cc"][0] if found["cc"] else "",
        "Python.h": str(header) if header.is_file() else "",
        "nvcc": found["nvcc"][-1] if found["nvcc"] else "",
    }


def run_command(command: list[str]) -> str:
    """Return the output of a command, empty if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMMAND_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# -- folders -----------------------------------------------------------------------------------------------------------


def describe_folder(folder: Folder) -> dict[str, Any]:
    """Return the path of a folder, its free space in GiB, and what prevents writing to it, if anything."""
    try:
        path = Path(folder.find(os.environ)).expanduser().absolute()
    except (OSError, ValueError, RuntimeError) as error:  # there is no home directory, or no temporary folder
        return {"path": None, "obstacle": (getattr(error, "strerror", None) or str(error)).rstrip(".")}
    existing = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
    usage = shutil.disk_usage(existing)
    obstacle = ""
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        obstacle = f"{existing} cannot be written ({error.strerror})"
    return {
        "path": str(path),
        "obstacle": obstacle,
        "free_gib": round(usage.free / GIB, 1),
        "total_gib": round(usage.total / GIB, 1),
    }


# -- launcher and environment ------------------------------------------------------------------------------------------


def describe_launcher() -> dict[str, str]:
    """Return whether SLURM is here, which launcher has started this process, and an invalid variable, if any."""
    version = run_command(["srun", "--version"])
    slurm = f"{version or 'srun'} found" if version or shutil.which("srun") else "not found"
    if job := os.environ.get("SLURM_JOB_ID"):
        slurm += f", in job {job:.40}"
    started = [one.command for one in LAUNCHERS.values() if not find_missing_variables(one, os.environ)]
    found = {"SLURM": slurm, "started_by": ", ".join(started) or "no launcher"}
    try:
        validate_environment(os.environ)
    except ValueError as error:
        found["invalid"] = str(error)
    return found


def describe_environment() -> dict[str, str]:
    """Return the variables of SHOWN_VARIABLES that are set."""
    return {name: os.environ[name][:200] for name in SHOWN_VARIABLES if name in os.environ}
