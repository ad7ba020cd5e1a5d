"""Peak FLOPs of devices, looked up by name or measured."""

import pytest
import torch

from internvl.metrics.device_peak import DEVICE_PEAKS, get_device_peak, is_tf32_enabled, lookup_peak_flops


@pytest.mark.parametrize(
    ("name", "half", "tf32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA A800 80GB PCIe", 312, 156),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7),
        ("NVIDIA H100 PCIe", 756.5, 378),
        ("NVIDIA H100 NVL", 835.5, 417.5),
        ("NVIDIA H800", 989.4, 494.7),
        ("NVIDIA H200", 989.4, 494.7),
        ("NVIDIA H20", 148, 74),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_known_devices_are_looked_up_by_name(name, half, tf32):
    assert lookup_peak_flops(name, torch.bfloat16) == lookup_peak_flops(name, torch.float16) == half * 1e12
    assert lookup_peak_flops(name, torch.float32, tf32=True) == tf32 * 1e12
    assert lookup_peak_flops(name, torch.float32) < tf32 * 1e12 or name.endswith(("4090", "L40"))


def test_other_devices_are_measured():
    assert lookup_peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16) is None
    assert lookup_peak_flops("Some Accelerator 9000", torch.bfloat16) is None
    assert all(half >= tf32 >= single for _, half, tf32, single in DEVICE_PEAKS)
    peak, description = get_device_peak(torch.device("cpu"), torch.float32)
    assert 1e9 < peak < 1e14 and description.endswith("measured with a matrix product")
    assert get_device_peak(torch.device("cpu"), torch.float32) == (peak, description), "measured once per process"


def test_tf32_is_read_as_the_flag_sets_it():
    """After `fp32_precision` was set, as `--tf32` does since torch 2.9, torch raises where `allow_tf32` is read."""
    has_precision = hasattr(torch.backends, "fp32_precision")
    backend, name = (torch.backends, "fp32_precision") if has_precision else (torch.backends.cuda.matmul, "allow_tf32")
    before = getattr(backend, name)
    try:
        for value, is_enabled in [("tf32", True), ("ieee", False)] if has_precision else [(True, True), (False, False)]:
            setattr(backend, name, value)
            assert is_tf32_enabled() == is_enabled
    finally:
        setattr(backend, name, before)
