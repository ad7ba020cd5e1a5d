"""How long ranks exchange data in a step, by torch's profiler: for a sampled step, since watching costs time.

Nothing cheaper tells it for all ways to train: DDP reduces gradients beneath Python, DeepSpeed in hooks of its own, on
other streams, beside the computation or between it.
"""

from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def is_collective(event) -> bool:
    """Whether a profiler's event is a collective at work: a kernel of NCCL's, or what gloo's threads do."""
    if event.device_type == torch.autograd.DeviceType.CUDA:
        return event.name.lower().startswith("nccl")
    return event.name.startswith("gloo:")


def covered_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what intervals cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class CommProfiler:
    """Watches this process from `start` to `stop`."""

    def __init__(self, device: torch.device):
        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        self.activities, self.profiler = [activity], None

    def start(self) -> None:
        self.profiler = profile(activities=self.activities)
        self.profiler.start()

    def stop(self) -> float | None:
        """Seconds in which at least one collective was under way; None if nothing was watched."""
        if self.profiler is None:
            return None
        self.profiler.stop()
        events, self.profiler = self.profiler.events(), None
        return 1e-6 * covered_length((e.time_range.start, e.time_range.end) for e in events if is_collective(e))
