"""One contender of `tools/benchmark_step.py`, measured in its own process.

python -m tools.benchmark.contender_run JSON    # arguments of `measure_contender`; prints its result as JSON
"""

import json
import sys
import time

import torch
from torch import nn

from internvl.metrics.device_peak import lookup_peak_flops
from internvl.metrics.step_metrics import get_peak_memory
from internvl.planning.sample_cost import count_forward_flops, scale_to_training

from .contenders import CONTENDERS, Contender
from .memory import reset_peak_memory
from .samples import build_batches, count_loss_tokens, draw_sample_lengths, make_random_samples, plan_rows
from .sizes import MODEL_SIZES, build_config

LEARNING_RATE = 2e-4
Steps = list[list[dict]]  # step -> micro-batch -> batch


def measure_contender(
    name: str,
    size: str,
    num_samples: int,
    checkpointing: bool,
    dropout: float = 0.0,
    measure_memory: bool = False,
    measure_initial_loss: bool = False,
) -> dict:
    """Train a contender once on all samples.

    Args:
        measure_memory: train on the largest batches only and return nothing but `peak_bytes`, the peak beyond weights
            and data.
        measure_initial_loss: return `initial_loss`, too: the mean loss of all samples before the first step.

    Returns:
        `seconds`, `loss` (mean over loss tokens) and the counts of the pass; or `peak_bytes`.
    """
    contender, model_size = CONTENDERS[name], MODEL_SIZES[size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = contender.build_fn(model_size, checkpointing, dropout)
    config = build_config(model_size)
    lengths = draw_sample_lengths(config, num_samples)
    plan = plan_rows(config, lengths, contender.packed, contender.group_by_length)
    steps = build_batches(plan, make_random_samples(config, lengths, model_size.dtype))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, LEARNING_RATE, fused=device.type == "cuda")
    run = ContenderRun(contender, model, optimizer, model_size.dtype)
    run.warm_up(steps)
    if measure_memory:
        bytes_before = reset_peak_memory(device)
        run.train(select_largest_batches(steps))
        return {"peak_bytes": get_peak_memory(device) - bytes_before}
    result = {"initial_loss": run.evaluate(steps)} if measure_initial_loss else {}
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = run.train(steps)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    batches = [batch for step in steps for batch in step]
    num_tokens = int(lengths["tokens"].sum())
    # Model FLOPs count forward and gradients of inputs (2 passes: frozen weights need no gradients). They count neither
    # padding nor recomputation nor adapters.
    sample_cost = scale_to_training(count_forward_flops(config), vision_passes=2, llm_passes=2)
    flops = float(sample_cost.compute(lengths).sum())
    return result | {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all threads; hardly affected by other programs on the machine
        "loss": loss,
        "samples": num_samples,
        "tokens": num_tokens,
        "loss_tokens": sum(map(count_loss_tokens, batches)),
        "tiles": int(lengths["tiles"].sum()),
        "padding": 1 - num_tokens / sum(batch["input_ids"].numel() for batch in batches),
        "steps": len(steps),
        "trainable_parameters": sum(parameter.numel() for parameter in trainable),
        "flops": flops,
        "mfu": compute_mfu(flops / seconds, device, model_size.dtype),
    }


def compute_mfu(flops_per_second: float, device: torch.device, dtype: torch.dtype) -> float | None:
    """Compute the model FLOPs utilization, None without a known peak."""
    peak = lookup_peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    return flops_per_second / peak if peak else None


def select_largest_batches(steps: Steps) -> Steps:
    """Select a step of two batches: most positions and most tiles."""
    batches = [batch for step in steps for batch in step]
    return [[max(batches, key=lambda batch: batch[name].numel()) for name in ("input_ids", "pixel_values")]]


class ContenderRun:
    """A contender's model with its optimizer.

    A model in another dtype than float32 runs under autocast, with adapters in float32.
    """

    def __init__(self, contender: Contender, model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype):
        self.contender, self.model, self.optimizer, self.dtype = contender, model, optimizer, dtype
        self.device = next(model.parameters()).device

    def compute_loss(self, batch: dict) -> torch.Tensor:
        """Compute the mean loss over the loss tokens of a batch."""
        inputs = {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.contender.loss_fn(self.model, inputs)

    def warm_up(self, steps: Steps) -> None:
        """Run forward and backward on the smallest batch, without an optimizer step."""
        smallest = min((batch for step in steps for batch in step), key=lambda batch: batch["input_ids"].numel())
        self.compute_loss(smallest).backward()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, steps: Steps) -> float:
        """Compute the mean loss over the loss tokens of all batches."""
        batches = [batch for step in steps for batch in step]
        counts = [count_loss_tokens(batch) for batch in batches]
        total = sum(self.compute_loss(batch).double() * n for batch, n in zip(batches, counts, strict=True))
        return float(total) / sum(counts)

    def train(self, steps: Steps) -> float:
        """Train on all steps and return the mean loss over loss tokens."""
        total, count = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for step in steps:
            for batch in step:
                loss = self.compute_loss(batch)
                (loss / len(step)).backward()
                total += loss.detach() * count_loss_tokens(batch)
                count += count_loss_tokens(batch)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(total) / count  # float() waits for the device


if __name__ == "__main__":
    print(json.dumps(measure_contender(**json.loads(sys.argv[1]))))
