"""How the benchmarks measure memory: from a moment on, by `peak_memory` of `train/metrics.py`."""

import ctypes
import gc
from pathlib import Path

import torch

from internvl.metrics.step_timer import peak_memory


def start_counting_memory(device: torch.device) -> int:
    """Bytes in use; from now on the peak is counted anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    return peak_memory(device)
