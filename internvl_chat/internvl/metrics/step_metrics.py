"""Throughput, time, memory and MFU of a logging step."""

import json
import logging
import os
import resource
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from internvl.metrics.model_flops import ModelFlops
from internvl.metrics.step_timer import STEP_PHASES, StepTimer
from internvl.model.internvl_chat.documents import get_loss_mask
from internvl.regular_files import open_regular_file

logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"  # in the output folder


class StepMetrics:
    """Counts and times of this rank since the last report.

    Args:
        device: whose time and memory are measured.

    Attributes:
        peak_flops: FLOPs per second of the device at 100 % MFU.
        flops_of_batch: FLOPs that the last counted batch requires.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.timer = StepTimer(device)
        self.counts: Counter[str] = Counter()
        self.num_steps = 0
        self.peak_flops = float("nan")
        self.flops_of_batch = 0.0

    def count_batch(self, batch: dict, document_lengths: Sequence[int], flops: ModelFlops) -> None:
        """Count the work of a batch that is still on the CPU.

        Args:
            batch: `input_ids`, `labels`, `position_ids` (B, L) and `image_flags` (T,).
            document_lengths: tokens of each document in it, padding excluded.
        """
        num_loss_tokens = int(get_loss_mask(batch["labels"], batch["position_ids"]).sum())
        num_tiles = int(batch["image_flags"].sum())
        self.flops_of_batch = flops.count(document_lengths, num_loss_tokens, num_tiles)
        self.counts.update(  # pyrefly: ignore[bad-argument-type]  # FLOPs are a float
            tokens=sum(document_lengths),
            loss_tokens=num_loss_tokens,
            tiles=num_tiles,
            flops=self.flops_of_batch,  # pyrefly: ignore[bad-argument-type]  # a float
            positions=batch["input_ids"].numel(),
        )

    def take_report(self) -> dict:
        """Return this rank's report for `combine_rank_reports` and start the next one."""
        report = {
            "counts": dict(self.counts),
            "seconds": self.timer.take(),
            "memory_bytes": get_peak_memory(self.device),
            "peak_flops": self.peak_flops,
            "num_steps": self.num_steps,
        }
        self.counts.clear()
        self.num_steps = 0
        return report


def combine_rank_reports(reports: Sequence[dict]) -> dict[str, float]:
    """Combine the reports of all ranks to one log entry."""
    counts, seconds = Counter(), Counter()
    for report in reports:
        counts.update(report["counts"])
        seconds.update(report["seconds"])
    num_ranks, num_steps = len(reports), reports[0]["num_steps"]
    mean_seconds = sum(seconds.values()) / num_ranks
    flops_per_second = counts["flops"] / mean_seconds
    data_wait = max(report["seconds"].get("data", 0.0) / sum(report["seconds"].values()) for report in reports)
    return {
        "step_seconds": mean_seconds / num_steps,
        "tokens_per_second": counts["tokens"] / mean_seconds,
        "loss_tokens_per_second": counts["loss_tokens"] / mean_seconds,
        "tiles_per_second": counts["tiles"] / mean_seconds,
        "padding_percent": 100 * (1 - counts["tokens"] / max(1, counts["positions"])),
        "data_wait_percent": 100 * data_wait,
        **{f"{phase}_seconds": seconds[phase] / num_ranks / num_steps for phase in STEP_PHASES},
        "peak_memory_gib": max(report["memory_bytes"] for report in reports) / 2**30,
        "tflops": flops_per_second / num_ranks / 1e12,
        "mfu_percent": 100 * flops_per_second / sum(report["peak_flops"] for report in reports),
    }


def get_peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes.

    On a GPU it is the memory of tensors, on a CPU that of this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` would include the peak of the process that forked this one
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# -- metrics.jsonl -----------------------------------------------------------------------------------------------------


def append_metrics(file: Path, entry: dict) -> None:
    """Append a line to a metrics file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry) + "\n")


def drop_metrics_after(file: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and an incomplete last line.

    Lines that this package has not written are kept, as they are.
    """
    if not file.exists():
        return
    unfinished, num_foreign = file.with_name(f"unfinished-{file.name}"), 0
    with open_regular_file(file) as lines, unfinished.open("wb") as kept:
        for line in lines:
            step_of_line = _read_step(line)
            if step_of_line is None and line.endswith(b"\n"):
                num_foreign += 1
            elif step_of_line is None or step_of_line > step:
                continue
            kept.write(line if line.endswith(b"\n") else line + b"\n")
    os.replace(unfinished, file)
    if num_foreign:
        logger.warning("%s has %d lines that are no metrics of a step; they are kept.", file, num_foreign)


def _read_step(line: bytes) -> float | None:
    """Return the step of a line, None for a foreign or incomplete one."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if type(step) in (int, float) else None
