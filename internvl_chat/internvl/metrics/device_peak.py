"""How many FLOPs a second a device can do at most: what MFU is a share of. By its name, else measured."""

import time
from functools import lru_cache

import torch

# Words of a device's name -> dense peak in TFLOPS of bf16 and fp16 (accumulated in fp32), of fp32 as TF32, and of fp32
# itself, as NVIDIA's data sheets give them (those with sparsity, halved). The first row that fits counts.
DEVICE_PEAKS = [
    ("B200", 2250, 1125, 75),
    ("GH200", 989.4, 494.7, 66.9),
    ("H200 NVL", 835.5, 417.5, 60),
    ("H200", 989.4, 494.7, 66.9),
    ("H100 NVL", 835.5, 417.5, 60),
    ("H100 PCIe", 756.5, 378, 51.2),
    ("H800 PCIe", 756.5, 378, 51.2),
    ("H100", 989.4, 494.7, 66.9),
    ("H800", 989.4, 494.7, 66.9),
    ("H20", 148, 74, 44),
    ("A100", 312, 156, 19.5),
    ("A800", 312, 156, 19.5),
    ("A30", 165, 82, 10.3),
    ("A40", 149.7, 74.8, 37.4),
    ("A10", 125, 62.5, 31.2),
    ("L40S", 362, 183, 91.6),
    ("L40", 181, 90.5, 90.5),
    ("L4", 121, 60, 30.3),
    ("RTX 6000 Ada", 364.2, 182.1, 91.1),
    ("RTX A6000", 154.8, 77.4, 38.7),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("RTX 3090", 71, 35.6, 35.6),
]
HALF = (torch.bfloat16, torch.float16)


def lookup_peak(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """FLOPs a second of a device of that name; None where the table does not know it, or it is a slice of a device."""
    words = name.replace("-", " ").split()
    if "MIG" in words:
        return None
    for known, half, with_tf32, single in DEVICE_PEAKS:
        if set(known.split()) <= set(words):
            return 1e12 * (half if dtype in HALF else with_tf32 if tf32 else single)
    return None


@lru_cache
def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of the fastest of some matrix products, each twice as wide until one takes 20 ms."""
    best, size, seconds = 0.0, 128, 0.0
    while seconds < 0.02 and size < 16384:
        size *= 2
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        for _ in range(3):
            start = time.perf_counter()
            product = matrix @ matrix
            product[0, 0].item()  # waits for the device
            seconds = time.perf_counter() - start
            best = max(best, 2 * size**3 / seconds)
    return best


def device_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Peak of a device for products of that type, in FLOPs a second, and a sentence on where it is from."""
    name, peak = "this processor", None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = lookup_peak(name, dtype, torch.backends.cuda.matmul.allow_tf32)
    source = "its data sheet" if peak else "a matrix product, measured"
    peak = peak or measure_peak(device, dtype)
    return peak, f"{peak / 1e12:.4g} TFLOPS in {str(dtype).removeprefix('torch.')} on {name}, by {source}"
