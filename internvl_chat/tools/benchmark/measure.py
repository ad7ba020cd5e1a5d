"""One contender in a process of its own: builds it, lets it train once on all samples, and tells what that took."""

import ctypes
import gc
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from internvl.train.flops import Passes, step_cost

from .contenders import CONTENDERS, Contender
from .samples import batches_of, make_samples, plan_of, sizes_of_samples, trained_tokens
from .sizes import SIZES, config_of

RATE = 2e-4
Steps = list[list[dict]]


def measure(name: str, size_name: str, samples: int, checkpointing: bool, dropout: float, first_loss: bool) -> dict:
    """Seconds, tokens, peak memory beyond the weights (bytes) and losses per trained token of one pass.

    Args:
        first_loss: compute the loss of all samples before the first update, too.
    """
    contender, size = CONTENDERS[name], SIZES[size_name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = contender.build(size, checkpointing, dropout)
    config = config_of(size)
    lengths = sizes_of_samples(config, samples)
    steps = batches_of(
        plan_of(config, lengths, contender.packed, contender.by_length), make_samples(config, lengths, size.dtype)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, fused=device.type == "cuda")
    run = Run(contender, model, device, size.dtype)

    smallest = min((batch for step in steps for batch in step), key=lambda batch: batch["input_ids"].numel())
    run.loss(smallest).backward()
    optimizer.zero_grad()
    found = {"first_loss": run.mean_loss(steps)} if first_loss else {}
    with peak_memory(device) as peak:
        start = time.perf_counter()
        loss = run.train(steps, optimizer)
        seconds = time.perf_counter() - start
    tokens = int(lengths.tokens.sum())
    places = sum(batch["input_ids"].numel() for step in steps for batch in step)
    return found | {
        "seconds": seconds,
        "loss": loss,
        "peak_bytes": peak[0],
        "weights_bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "tokens": tokens,
        "trained_tokens": int(lengths.trained.sum()),
        "tiles": int(lengths.tiles.sum()),
        "padding": 1 - tokens / places,
        "steps": len(steps),
        "flops": float(step_cost(config, Passes(2 + checkpointing, 2 + checkpointing)).of(lengths).sum()),
    }


class Run:
    """A contender's model on a device; what is not fp32 computes under autocast, its adapters stay fp32."""

    def __init__(self, contender: Contender, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.contender, self.model, self.device, self.dtype = contender, model, device, dtype

    def loss(self, batch: dict) -> torch.Tensor:
        """Mean over the trained tokens of a batch."""
        there = {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.contender.loss(self.model, there)

    @torch.no_grad()
    def mean_loss(self, steps: Steps) -> float:
        """Mean over the trained tokens of all samples."""
        batches = [batch for step in steps for batch in step]
        counts = [trained_tokens(batch) for batch in batches]
        total = sum(self.loss(batch).double() * n for batch, n in zip(batches, counts, strict=True))
        return float(total) / sum(counts)

    def train(self, steps: Steps, optimizer: torch.optim.Optimizer) -> float:
        """One update a step; the mean of the losses, by trained tokens, when the device is done."""
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for step in steps:
            for batch in step:
                loss = self.loss(batch)
                (loss / len(step)).backward()
                total += loss.detach() * trained_tokens(batch)
            optimizer.step()
            optimizer.zero_grad()
        return float(total) / sum(trained_tokens(batch) for step in steps for batch in step)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """The list's one entry is, at the end, the most memory beyond that at the start: allocated on a GPU, resident
    (Linux counts the peak anew) else."""
    gc.collect()
    peak = []
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.append(torch.cuda.max_memory_allocated() - before)
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = most_resident()
    yield peak
    peak.append(most_resident() - before)


def most_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
