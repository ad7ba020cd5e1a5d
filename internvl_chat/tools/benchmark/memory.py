"""Peak memory of a benchmark, counted from a chosen moment."""

import ctypes
import gc
from pathlib import Path

import torch

from internvl.metrics.step_metrics import get_peak_memory

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def set_malloc_threshold(num_bytes: int) -> None:
    """Let glibc return freed blocks of this size and more to the system at once.

    With a small threshold, holes in the heap do not count as memory, but allocations take longer.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, num_bytes)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * num_bytes)  # the proportion that glibc itself keeps


def reset_peak_memory(device: torch.device) -> int:
    """Reset the peak that `get_peak_memory` reports and return the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: 5 resets the peak (VmHWM)
    return get_peak_memory(device)
