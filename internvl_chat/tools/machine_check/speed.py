"""Measure training steps of a model with the shapes of a published one and random weights.

A step is one packed row: forward and backward pass, AdamW on the adapters. Every step has documents of other lengths,
as in training. The model has the data type of a run with DeepSpeed: all of it bf16 on a GPU.
"""

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from internvl.metrics.device_peak import get_device_peak
from internvl.metrics.model_flops import count_model_flops
from internvl.metrics.step_metrics import get_peak_memory
from internvl.model.activation_checkpointing import apply_gradient_checkpointing
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.model.liger_kernels import use_liger_kernels
from internvl.tools.benchmark.memory import reset_peak_memory
from internvl.tools.benchmark.samples import count_loss_tokens
from internvl.tools.benchmark.sizes import MODEL_SIZES, TILE_TOKENS, ModelSize, build_config

from .checks import Checks, SkippedCheck
from .models import build_adapted_model, build_row, move_batch

# Size -> GiB of free GPU memory that a step requires with gradient checkpointing; estimated, with a reserve.
REQUIRED_GIB = {"8b": 36, "2b": 16, "1b": 10}
ROW_TEXT_TOKENS = 3328  # beside 19 tiles of 256 tokens: a row of 8192
TILES = (6, 3, 1, 0, 7, 0, 2, 0)  # of the documents of a row
NUM_WARMUP_STEPS, NUM_STEPS, MIN_STEPS = 2, 8, 3
MAX_SECONDS = 15.0  # of the measured steps of a setting, if MIN_STEPS are done
# Setting -> share of layers that recompute their activations, and a change of the model that stays for those after it.
SETTINGS: dict[str, tuple[float, Callable[[InternVLChatModel], None] | None]] = {
    "all layers recomputed": (1.0, None),
    "4 of 5 layers recomputed": (0.8, None),
    "all layers recomputed, Liger": (1.0, use_liger_kernels),
}


def list_speed_checks(device: torch.device, sizes: Sequence[str] | None = None) -> Checks:
    """List a check for each setting, with the largest size that fits.

    Args:
        sizes: keys of MODEL_SIZES, of which the first that fits is used; default: by memory.
    """
    name = choose_size(device, sizes or (tuple(REQUIRED_GIB) if device.type == "cuda" else ("test",)))
    size = MODEL_SIZES[name]
    with device:
        model = build_adapted_model(size, dropout=0.05)
    steps = TrainingSteps(model, size, device)
    for setting, (ratio, change_fn) in SETTINGS.items():
        yield f"{name}, {setting}", partial(measure_setting, steps, ratio, change_fn)
    if device.type == "cuda":
        yield "waits for the GPU", lambda: count_synchronizations(steps)


def choose_size(device: torch.device, sizes: Sequence[str]) -> str:
    """Choose the first size that fits into free memory.

    Raises:
        SkippedCheck: none fits.
    """
    if device.type != "cuda":
        return sizes[0]
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    for name in sizes:
        if REQUIRED_GIB[name] <= free:
            return name
    raise SkippedCheck(f"{free:.1f} GiB of GPU memory are free, {sizes[-1]} requires {REQUIRED_GIB[sizes[-1]]}")


class TrainingSteps:
    """A model with its optimizer and its rows."""

    def __init__(self, model: InternVLChatModel, size: ModelSize, device: torch.device):
        self.model, self.size, self.device = model, size, device
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, 1e-4, fused=True)
        self.flops = count_model_flops(model)
        self.rows = self.draw_rows()

    def draw_rows(self) -> Iterator[dict]:
        """Draw rows of one size, each with other lengths of its documents."""
        generator, num_rows = torch.Generator().manual_seed(0), 0
        text_tokens = ROW_TEXT_TOKENS * count_image_tokens(build_config(self.size)) // TILE_TOKENS
        while True:
            cuts = torch.randperm(text_tokens - 1, generator=generator)[: len(TILES) - 1].sort().values + 1
            texts = torch.diff(cuts, prepend=torch.zeros(1), append=torch.tensor([text_tokens])).int().tolist()
            row = build_row(self.size, list(zip(texts, TILES, strict=True)), seed=num_rows)
            is_cuda, num_rows = self.device.type == "cuda", num_rows + 1
            yield {k: v.pin_memory() if is_cuda and torch.is_tensor(v) else v for k, v in row.items()}

    def train_step(self, row: dict) -> torch.Tensor:
        """Train on a row and return its loss, without waiting for the device."""
        loss = self.model(**move_batch(row, self.device, self.size.dtype)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def time_step(self) -> tuple[float, float, dict]:
        """Train on the next row: seconds, loss, and the row."""
        row = next(self.rows)
        start = time.perf_counter()
        loss = float(self.train_step(row))  # waits for everything that is queued on the device
        return time.perf_counter() - start, loss, row


def measure_setting(steps: TrainingSteps, ratio: float, change_fn: Callable[[InternVLChatModel], None] | None) -> dict:
    """Measure steps in a setting of SETTINGS, after some that are not measured.

    Raises:
        ValueError: a loss is not finite.
        SkippedCheck: the setting is not supported here, or memory is short.
    """
    try:
        if change_fn:
            change_fn(steps.model)
    except ValueError as error:
        raise SkippedCheck(str(error)) from None
    for part in (steps.model.vision_model, steps.model.language_model):
        apply_gradient_checkpointing(part, ratio)
    reset_peak_memory(steps.device)
    try:
        warmup = [steps.time_step() for _ in range(NUM_WARMUP_STEPS)]
        measured = []
        while len(measured) < NUM_STEPS and (
            len(measured) < MIN_STEPS or sum(seconds for seconds, _, _ in measured) < MAX_SECONDS
        ):
            measured.append(steps.time_step())
    except torch.OutOfMemoryError:
        steps.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        raise SkippedCheck("not enough GPU memory") from None
    losses = [loss for _, loss, _ in (*warmup, *measured)]
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"expected finite losses, got {losses}")
    return {"warmup_seconds": round(sum(seconds for seconds, _, _ in warmup), 3)} | summarize_steps(steps, measured)


def summarize_steps(steps: TrainingSteps, measured: list[tuple[float, float, dict]]) -> dict:
    """Summarize measured steps: median of the time with its range, throughput, MFU, peak memory."""
    seconds = [seconds for seconds, _, _ in measured]
    median, row = statistics.median(seconds), measured[0][2]
    # All rows have the same tokens and tiles. Their attention differs by the lengths of documents.
    peak, _ = get_device_peak(steps.device, steps.size.dtype)
    flops = [count_row_flops(steps, row) for _, _, row in measured]
    return {
        "step_seconds": round(median, 4),
        "range": f"{min(seconds):.4g} - {max(seconds):.4g}",
        "steps": len(seconds),
        "tokens_per_second": round(row["input_ids"].numel() / median),
        "mfu_percent": round(100 * statistics.mean(flops) / median / peak, 1),
        "peak_memory_gib": round(get_peak_memory(steps.device) / 2**30, 2),
    }


def count_row_flops(steps: TrainingSteps, row: dict) -> float:
    """Count the FLOPs that a row requires."""
    bounds = row["cu_seqlens"]
    lengths = [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
    return steps.flops.count(lengths, count_loss_tokens(row), len(row["pixel_values"]))


def count_synchronizations(steps: TrainingSteps) -> dict:
    """Count how often the host waits for the GPU in a step, batch and optimizer included."""
    row = next(steps.rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps.train_step(row)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"synchronizations": sum("synchroniz" in str(warning.message) for warning in caught)}
