"""One contender of `tools/benchmark_step.py`: what its process builds, and its turns."""

import time
from collections.abc import Callable

import torch
from torch import nn

from internvl.metrics.device_peak import lookup_peak_flops
from internvl.metrics.step_metrics import get_peak_memory
from internvl.planning.sample_cost import count_forward_flops, scale_to_training

from .contenders import CONTENDERS, LORA_PARTS, Contender
from .memory import reset_peak_memory, set_malloc_threshold
from .samples import (
    build_batches,
    count_loss_tokens,
    draw_sample_lengths,
    make_random_samples,
    plan_rows,
    split_into_turns,
)
from .sizes import MODEL_SIZES, ModelSize, build_config, get_image_token_id

# Bytes. The large threshold is the highest that glibc reaches by itself.
SMALL_MALLOC_THRESHOLD, LARGE_MALLOC_THRESHOLD = 2**16, 2**25
Batches = list[dict]


def start_contender(
    name: str,
    size: str,
    mixtures: list[str],
    num_turns: int,
    num_samples: int,
    checkpointing: bool,
    lora: str = "vision+llm",
    dropout: float = 0.0,
) -> tuple[dict, Callable[[str, int], dict]]:
    """Build a contender and measure its memory.

    Args:
        num_samples: per turn.

    Returns:
        The facts of each mixture (see `ContenderRun.describe`), and a function that runs a step on a turn's samples and
        returns `seconds`, `cpu_seconds` (of all threads; hardly affected by other programs) and `loss`.
    """
    contender, model_size = CONTENDERS[name], MODEL_SIZES[size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_malloc_threshold(SMALL_MALLOC_THRESHOLD)
    try:
        with device:
            model = contender.build_fn(model_size, checkpointing, dropout, lora)
        run = ContenderRun(contender, model, model_size.dtype)
        turns = {mixture: build_turns(contender, model_size, mixture, num_turns, num_samples) for mixture in mixtures}
        facts = {mixture: run.describe(turns[mixture]) for mixture in mixtures}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}, lambda *_: {}
    set_malloc_threshold(LARGE_MALLOC_THRESHOLD)
    lengths = {mixture: count_work(model_size, mixture, num_turns, num_samples, lora) for mixture in mixtures}
    peak = lookup_peak_flops(torch.cuda.get_device_name(device), model_size.dtype) if device.type == "cuda" else None
    facts = {mixture: facts[mixture] | lengths[mixture] | {"peak_flops": peak} for mixture in mixtures}
    return facts, lambda mixture, number: {"mixture": mixture} | run.take_turn(turns[mixture][number])


def build_turns(contender: Contender, size: ModelSize, mixture: str, num_turns: int, num_samples: int) -> list[Batches]:
    """Build a contender's batches of each turn; the samples are the same for all contenders."""
    config = build_config(size)
    lengths = draw_sample_lengths(config, num_turns * num_samples, mixture)
    samples = make_random_samples(config, lengths, size.dtype)
    turns = []
    for ids in split_into_turns(lengths, num_turns):
        plan = plan_rows(config, lengths[ids], contender.packed, contender.group_by_length)
        steps = build_batches(plan, [samples[i] for i in ids], image_token_id=get_image_token_id(config))
        turns.append([batch for step in steps for batch in step])
    return turns


def count_work(size: ModelSize, mixture: str, num_turns: int, num_samples: int, lora: str) -> dict:
    """Count the `tokens`, `tiles` and model `flops` of each turn.

    Parts with LoRA cost two passes: frozen weights need no gradients. Padding, recomputation and adapters do not count.
    """
    config = build_config(size)
    lengths = draw_sample_lengths(config, num_turns * num_samples, mixture)
    turns = lengths[split_into_turns(lengths, num_turns)]  # (num_turns, num_samples)
    vision_passes = 2 if "vision_model" in LORA_PARTS[lora] else 1
    cost = scale_to_training(count_forward_flops(config), vision_passes=vision_passes, llm_passes=2)
    return {
        "tokens": turns["tokens"].sum(axis=1).tolist(),
        "tiles": turns["tiles"].sum(axis=1).tolist(),
        "flops": [float(cost.compute(turn).sum()) for turn in turns],
    }


class ContenderRun:
    """A contender's model with its optimizer.

    A model in another dtype than float32 runs under autocast, with adapters in float32.
    """

    def __init__(self, contender: Contender, model: nn.Module, dtype: torch.dtype):
        self.contender, self.model, self.dtype = contender, model, dtype
        self.device = next(model.parameters()).device
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Without a learning rate, steps take as long, and the losses of all contenders stay comparable.
        self.optimizer = torch.optim.AdamW(self.trainable, lr=0.0, fused=self.device.type == "cuda")

    def describe(self, turns: list[Batches]) -> dict:
        """Describe a mixture, and measure memory.

        Returns:
            `peak_bytes`: beyond weights and data, on the largest batches of all turns. `padding`: share of the
            positions. `trainable_parameters`.
        """
        batches = [batch for turn in turns for batch in turn]
        # Libraries allocate what they keep at first use.
        self.train(*self.prepare([min(batches, key=lambda batch: batch["input_ids"].numel())]))
        self.optimizer.state.clear()
        largest = [max(batches, key=lambda batch: batch[name].numel()) for name in ("input_ids", "pixel_values")]
        inputs = self.prepare(largest[:1] if largest[0] is largest[1] else largest)
        bytes_before = reset_peak_memory(self.device)
        self.train(*inputs)
        peak_bytes = get_peak_memory(self.device) - bytes_before
        num_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        return {
            "peak_bytes": peak_bytes,
            "padding": 1 - num_tokens / sum(batch["input_ids"].numel() for batch in batches),
            "trainable_parameters": sum(parameter.numel() for parameter in self.trainable),
        }

    def take_turn(self, batches: Batches) -> dict:
        """Train a step and measure it."""
        inputs = self.prepare(batches)
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = self.train(*inputs)
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "loss": loss,
        }

    def prepare(self, batches: Batches) -> tuple[Batches, list[int]]:
        """Move batches to the device and count their loss tokens."""
        inputs = [{k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()} for batch in batches]
        return inputs, [count_loss_tokens(batch) for batch in batches]

    def compute_loss(self, batch: dict) -> torch.Tensor:
        """Compute the mean loss over the loss tokens of a batch."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.contender.loss_fn(self.model, batch)

    def train(self, batches: Batches, counts: list[int]) -> float:
        """Train a step, a micro-batch per batch, and return the mean loss over loss tokens."""
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for batch, count in zip(batches, counts, strict=True):
            loss = self.compute_loss(batch)
            (loss / len(batches)).backward()
            total += loss.detach() * count
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total) / sum(counts)  # float() waits for the device
