"""Peak FLOPs per second of a device: the reference of MFU.

The peaks of common GPUs are in a table. Those of other devices are measured.
"""

import time
from functools import lru_cache

import torch

# Words of a device's name -> dense peak in TFLOPS of bf16 and fp16 (accumulated in fp32), of fp32 as TF32, and of fp32
# itself, from NVIDIA's data sheets (without sparsity: half of what they list). The first matching row is used.
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
HALF_PRECISION = (torch.bfloat16, torch.float16)


def lookup_peak_flops(device_name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """Look up the FLOPs per second of a device.

    Returns:
        None if the table has no such device, or if it is a slice of one (MIG).
    """
    words = device_name.replace("-", " ").split()
    if "MIG" in words:
        return None
    for known_name, half, with_tf32, single in DEVICE_PEAKS:
        if set(known_name.split()) <= set(words):
            return 1e12 * (half if dtype in HALF_PRECISION else with_tf32 if tf32 else single)
    return None


def is_tf32_enabled() -> bool:
    """Return whether fp32 matrix products on CUDA use TF32.

    `--tf32` sets `fp32_precision`, which torch has since 2.9. Then torch refuses to read the older `allow_tf32`.
    """
    matmul = torch.backends.cuda.matmul
    return bool(matmul.fp32_precision == "tf32" if hasattr(torch.backends, "fp32_precision") else matmul.allow_tf32)


@lru_cache
def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOPs per second of matrix products.

    Their size doubles until one takes 20 ms.
    """
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


def get_device_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak FLOPs per second of a device and its description."""
    name, peak = "this CPU", None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = lookup_peak_flops(name, dtype, is_tf32_enabled())
    source = "from its data sheet" if peak else "measured with a matrix product"
    peak = peak or measure_peak_flops(device, dtype)
    return peak, f"{peak / 1e12:.4g} TFLOPS in {str(dtype).removeprefix('torch.')} on {name}, {source}"
