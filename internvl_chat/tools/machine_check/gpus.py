"""Report GPUs as the driver and as torch see them, their links, and NCCL."""

import re
import warnings
from collections import Counter
from itertools import combinations
from typing import Any

from .checks import describe_error
from .host import GIB, run_command

GPU_FIELDS = ("name", "memory.total", "memory.free")  # of nvidia-smi, in MiB


def describe_driver() -> dict[str, Any]:
    """Return the NVIDIA driver, the CUDA version that it supports, its GPUs and their links; {} without a driver."""
    query = run_command(["nvidia-smi", f"--query-gpu=driver_version,{','.join(GPU_FIELDS)}", "--format=csv,noheader"])
    rows = [line.split(", ") for line in query.splitlines()]
    if not rows or any(len(row) != len(GPU_FIELDS) + 1 for row in rows):
        return {}
    cuda = re.search(r"CUDA Version: *([\d.]+)", run_command(["nvidia-smi"]))
    return {
        "version": rows[0][0],
        "cuda": cuda[1] if cuda else "unknown",
        "gpus": [dict(zip(GPU_FIELDS, row[1:], strict=True)) for row in rows],
        "links": count_links(run_command(["nvidia-smi", "topo", "-m"])) if len(rows) > 1 else {},
    }


def count_links(matrix: str) -> dict[str, int]:
    """Count the kinds of links between pairs of GPUs, such as NV18 or PHB, in the matrix of `nvidia-smi topo -m`."""
    rows = [line.split() for line in matrix.splitlines()]
    rows = [row[1:] for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    pairs = combinations(range(len(rows)), 2)
    return dict(Counter(rows[first][second] for first, second in pairs))


def describe_torch() -> dict[str, Any]:
    """Return how torch was built, and each GPU after computing something on it. Imports torch."""
    import torch

    from internvl.dist_utils import require_no_gpus

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "rocm": torch.version.hip}
    found["cudnn"] = torch.backends.cudnn.version()
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["gpus"] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    if not has_cuda:
        found["reason"] = " ".join(str(caught[-1].message).split())[:200] if caught else ""
        try:
            require_no_gpus()
        except ValueError as error:
            found["hidden_gpus"] = str(error)
        return found
    found["gpus"] = [describe_gpu(index) for index in range(torch.cuda.device_count())]
    pairs = list(combinations(range(torch.cuda.device_count()), 2))
    found["gpu_pairs"] = len(pairs)
    found["peer_access_pairs"] = sum(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
    return found


def describe_gpu(index: int) -> dict[str, Any]:
    """Return name, compute capability and memory (GiB) of a GPU, and the error if it cannot compute."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    found: dict[str, Any] = {"name": properties.name, "capability": [properties.major, properties.minor]}
    try:
        torch.ones(1, device=f"cuda:{index}").add(1).item()  # fails if torch has no kernels for this GPU
        found["free_gib"], found["total_gib"] = (round(size / GIB, 1) for size in torch.cuda.mem_get_info(index))
    except RuntimeError as error:  # of torch.AcceleratorError, too
        found["error"] = describe_error(error)
    return found
