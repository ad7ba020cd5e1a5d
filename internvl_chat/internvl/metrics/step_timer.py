"""Divide the time of a training step into phases."""

import time
from collections import defaultdict
from typing import Any

import torch

STEP_PHASES = ("forward", "backward", "optimizer")  # reported in seconds; the others are `data` and `other`
NOT_OF_STEP = "evaluation"  # this phase counts neither as step time nor as wait


class StepTimer:
    """Timer of the phases of a step.

    A phase lasts until the next mark. On a GPU a mark is an event in the CUDA stream. It is read after it has
    completed, without synchronizing. Host work takes no time as long as the device is busy, so `data` is the time for
    which the device waits for data.
    """

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []  # phase, and a CUDA event or the seconds of a clock
        self.seconds: dict[str, float] = defaultdict(float)

    def mark(self, phase: str) -> None:
        """Start a phase and end the previous one."""
        if self.is_cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((phase, now))
        self._add_finished_phases()

    def _add_finished_phases(self) -> None:
        while len(self.marks) > 1 and (not self.is_cuda or self.marks[1][1].query()):
            (phase, start), (_, end) = self.marks[:2]
            # CUDA events give milliseconds.
            self.seconds[phase] += start.elapsed_time(end) / 1000 if self.is_cuda else end - start
            del self.marks[0]

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call.

        Waits for the device.
        """
        if not self.marks:
            return {}
        self.mark(self.marks[-1][0])
        if self.is_cuda:
            self.marks[-1][1].synchronize()
            self._add_finished_phases()
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        taken.pop(NOT_OF_STEP, None)
        return taken
