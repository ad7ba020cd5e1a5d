"""One contender in a process of its own: builds it, lets it train once on all samples, and tells what that took."""

import json
import sys
import time

import torch
from torch import nn

from internvl.metrics.device_peak import lookup_peak
from internvl.metrics.step_timer import peak_memory
from internvl.planning.sample_cost import Passes, step_cost

from .contenders import CONTENDERS, Contender
from .memory import start_counting_memory
from .samples import batches_of, make_samples, plan_of, sizes_of_samples, trained_tokens
from .sizes import SIZES, config_of

RATE = 2e-4
Steps = list[list[dict]]


def measure(
    name: str,
    size: str,
    samples: int,
    checkpointing: bool,
    dropout: float = 0.0,
    what: str = "time",
    first_loss: bool = False,
) -> dict:
    """Train a contender on all samples once.

    Args:
        what: `time`: of the whole pass; `memory`: the most beyond weights and data, on the largest batches alone.
        first_loss: compute the loss of all samples before the first update, too.

    Returns:
        `peak_bytes`; or `seconds`, `loss` and `first_loss` (means over trained tokens), and the sizes of the pass.
    """
    contender, size = CONTENDERS[name], SIZES[size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = contender.build(size, checkpointing, dropout)
    config = config_of(size)
    lengths = sizes_of_samples(config, samples)
    plan = plan_of(config, lengths, contender.packed, contender.by_length)
    steps = batches_of(plan, make_samples(config, lengths, size.dtype))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    run = Run(contender, model, torch.optim.AdamW(trained, RATE, fused=device.type == "cuda"), size.dtype)
    run.warm_up(steps)
    if what == "memory":
        before = start_counting_memory(device)
        run.train(largest(steps))
        return {"peak_bytes": peak_memory(device) - before}
    found = {"first_loss": run.mean_loss(steps)} if first_loss else {}
    start, at_work = time.perf_counter(), time.process_time()
    loss = run.train(steps)
    seconds, at_work = time.perf_counter() - start, time.process_time() - at_work
    tokens = int(lengths.tokens.sum())
    places = sum(batch["input_ids"].numel() for step in steps for batch in step)
    needed = float(step_cost(config, Passes(2, 2)).of(lengths).sum())  # no padding, nothing twice, adapters' own apart
    peak = lookup_peak(torch.cuda.get_device_name(device), size.dtype) if device.type == "cuda" else None
    return found | {
        "seconds": seconds,
        "cpu_seconds": at_work,  # of all threads: what the step took of a machine that others use, too
        "loss": loss,
        "samples": samples,
        "tokens": tokens,
        "trained_tokens": int(lengths.trained.sum()),
        "tiles": int(lengths.tiles.sum()),
        "padding": 1 - tokens / places,
        "steps": len(steps),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "flops": needed,
        "mfu": peak and needed / seconds / peak,
    }


def largest(steps: Steps) -> Steps:
    """A step of two batches: that of most tokens, padding included, and that of most tiles."""
    batches = [batch for step in steps for batch in step]
    return [[max(batches, key=lambda batch: batch[of].numel()) for of in ("input_ids", "pixel_values")]]


class Run:
    """A contender's model and its optimizer; what is not fp32 computes under autocast, and its adapters stay fp32."""

    def __init__(self, contender: Contender, model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype):
        self.contender, self.model, self.optimizer, self.dtype = contender, model, optimizer, dtype
        self.device = next(model.parameters()).device

    def loss(self, batch: dict) -> torch.Tensor:
        """Mean over the trained tokens of a batch."""
        there = {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.contender.loss(self.model, there)

    def warm_up(self, steps: Steps) -> None:
        """Forward and backward of the smallest batch, without an update."""
        self.loss(min((batch for step in steps for batch in step), key=lambda b: b["input_ids"].numel())).backward()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def mean_loss(self, steps: Steps) -> float:
        """Mean over the trained tokens of all samples, as the weights are."""
        batches = [batch for step in steps for batch in step]
        counts = [trained_tokens(batch) for batch in batches]
        total = sum(self.loss(batch).double() * n for batch, n in zip(batches, counts, strict=True))
        return float(total) / sum(counts)

    def train(self, steps: Steps) -> float:
        """One update a step; the mean of the losses, by trained tokens, when the device is done."""
        total, count = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for step in steps:
            for batch in step:
                loss = self.loss(batch)
                (loss / len(step)).backward()
                total += loss.detach() * trained_tokens(batch)
                count += trained_tokens(batch)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(total) / count


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
