"""What a logging step reports beside the loss: how fast the run goes, and where its time goes.

One rank counts and times here; `metered.py` puts the marks into the steps and brings the ranks together.
"""

import json
import os
import resource
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

STEP_PHASES = ("forward", "backward", "optimizer")  # whose seconds are reported; beside them `data` and `other`


class StepTimer:
    """Divides the time of a rank into phases: from each mark to the next.

    On a GPU a mark is an event in its stream and is read when it has passed, so that nobody waits for the device. What
    the host does while the device is still at work then costs no time: `data` is how long the device stood idle.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, torch.cuda.Event | float]] = []
        self.seconds: Counter[str] = Counter()

    def mark(self, phase: str) -> None:
        """Here `phase` begins."""
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((phase, now))
        self._settle()

    def _settle(self) -> None:
        while len(self.marks) > 1 and (not self.cuda or self.marks[1][1].query()):
            (phase, start), (_, end) = self.marks[:2]
            self.seconds[phase] += start.elapsed_time(end) / 1000 if self.cuda else end - start
            del self.marks[0]

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, up to now; waits for the device."""
        if not self.marks:
            return {}
        self.mark(self.marks[-1][0])
        if self.cuda:
            self.marks[-1][1].synchronize()
            self._settle()
        taken, self.seconds = dict(self.seconds), Counter()
        return taken


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors held at once on a GPU; on a CPU the most that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` would tell what the process that started this one held, if that was more
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def combine_rank_reports(ranks: Sequence[dict], steps: int) -> dict[str, float]:
    """What all ranks report of so many steps.

    Args:
        ranks: of each rank `counts` (tokens, trained, tiles, positions, flops), `seconds` by phase, `memory` in bytes,
            `peak` in FLOPs a second, and `communication` in seconds of one step, or None.
    """
    counts, seconds = Counter(), Counter()
    for rank in ranks:
        counts.update(rank["counts"])
        seconds.update(rank["seconds"])
    mean = sum(seconds.values()) / len(ranks)
    flops = counts["flops"] / mean
    found = {
        "step_seconds": mean / steps,
        "tokens_per_second": counts["tokens"] / mean,
        "trained_tokens_per_second": counts["trained"] / mean,
        "tiles_per_second": counts["tiles"] / mean,
        "padding_percent": 100 * (1 - counts["tokens"] / max(1, counts["positions"])),
        "data_wait_percent": 100 * max(rank["seconds"]["data"] / sum(rank["seconds"].values()) for rank in ranks),
        **{f"{phase}_seconds": seconds[phase] / len(ranks) / steps for phase in STEP_PHASES},
        "peak_memory_gib": max(rank["memory"] for rank in ranks) / 2**30,
        "tflops": flops / len(ranks) / 1e12,
        "mfu_percent": 100 * flops / sum(rank["peak"] for rank in ranks),
    }
    if all(rank["communication"] is not None for rank in ranks):
        found["communication_seconds"] = sum(rank["communication"] for rank in ranks) / len(ranks)
    return found


# -- metrics.jsonl -----------------------------------------------------------------------------------------------------


def append_metrics(file: Path, entry: dict) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry) + "\n")


def drop_metrics_after(file: Path, step: int) -> None:
    """Leave the lines of steps up to `step`: those behind it will be done again. A line that a kill cut goes, too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    unfinished = file.with_name(f"unfinished-{file.name}")
    unfinished.write_text("".join(kept), encoding="utf-8")
    os.replace(unfinished, file)
