"""Benchmark the cost of LoRA in a step: PEFT's layers and ours.

    python tools/benchmark_lora.py                                  # two CPU cores, under a minute
    python tools/benchmark_lora.py --dtype bf16 --llm 24 --vit 24 --tokens 8192 --tiles 12   # on a GPU

Frozen Qwen2 layers and InternViT layers with random weights run forward and backward. The contenders take turns, a step
each. Times are medians with their 95 % interval. "none" has no adapters; gradients still flow through all layers to
their input. Peak memory is counted beyond the weights.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2Model

from internvl.command_line import exit_on_user_error
from internvl.metrics.step_metrics import get_peak_memory
from internvl.model.internvl_chat.configuration_intern_vit import InternVisionConfig
from internvl.model.internvl_chat.modeling_intern_vit import InternVisionModel
from internvl.model.lora import LLM_TARGETS, VISION_TARGETS, LoraSettings, LoraTargets, add_adapters
from internvl.tools.benchmark.memory import reset_peak_memory
from internvl.tools.benchmark.turns import compare_turns, compute_median_interval, format_interval, measure_in_turns

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_peft_adapters(module: nn.Module, settings: LoraSettings, targets: LoraTargets) -> nn.Module:
    """Add adapters with PEFT's own layers."""
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # pyrefly: ignore[bad-argument-type]  # PEFT declares int, floats work
        lora_dropout=settings.dropout,
        target_modules=targets.modules,
    )
    return get_peft_model(module, config)


CONTENDERS = {
    "none": lambda module, settings, targets: module.requires_grad_(False),
    "peft": add_peft_adapters,
    "ours": add_adapters,
}


def build_modules(name: str, args: argparse.Namespace) -> list[tuple[nn.Module, dict]]:
    """Build LLM and vision encoder with adapters, and their inputs.

    The inputs are embeddings (1, L, hidden) and pixels (T, 3, 448, 448). Both require gradients, as they would after
    trainable layers.
    """
    torch.manual_seed(0)
    llm_config = Qwen2Config(
        vocab_size=8,
        hidden_size=args.width,
        intermediate_size=args.width * 19 // 7,
        num_hidden_layers=args.llm,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        use_cache=False,
    )
    vision_config = InternVisionConfig(
        hidden_size=args.vit_width,
        intermediate_size=4 * args.vit_width,
        num_hidden_layers=args.vit,
        num_attention_heads=args.vit_width // 64,
        qk_normalization=False,
        use_flash_attn=False,
    )
    embeddings, pixels = torch.randn(1, args.tokens, args.width), torch.randn(args.tiles, 3, 448, 448)
    settings, dtype = LoraSettings(args.rank, 2 * args.rank, args.dropout), DTYPES[args.dtype]
    modules = []
    for model_class, config, targets, input_name, value in (
        (Qwen2Model, llm_config, LLM_TARGETS["Qwen2ForCausalLM"], "inputs_embeds", embeddings),
        (InternVisionModel, vision_config, VISION_TARGETS, "pixel_values", pixels),
    ):
        module: Any = model_class(config)  # pyrefly: ignore[bad-argument-type]  # each row has its own pair
        module = module.to(args.device, dtype).train()
        if args.grad_checkpoint:
            module.gradient_checkpointing_enable({"use_reentrant": False})
        module = CONTENDERS[name](module, settings, targets)
        # PEFT makes adapters float32, DeepSpeed casts them to the model's data type.
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32 if args.lora_fp32 else dtype)
        modules.append((module, {input_name: value.to(args.device, dtype).requires_grad_()}))
    return modules


def start_contender(name: str, **settings) -> tuple[dict, Callable[[], dict]]:
    """Build a contender and run a step.

    Args:
        settings: of the command line.

    Returns:
        `peak_mb` of the step, and a function that measures the seconds `forward` and `step` of the next.
    """
    args = argparse.Namespace(**settings)
    torch.set_num_threads(args.threads)
    modules = build_modules(name, args)
    bytes_before = reset_peak_memory(torch.device(args.device))
    time_step(modules, args)
    peak_mb = (get_peak_memory(torch.device(args.device)) - bytes_before) / 1e6
    return {"peak_mb": peak_mb}, lambda: dict(zip(("forward", "step"), time_step(modules, args), strict=True))


def time_step(modules: list[tuple[nn.Module, dict]], args: argparse.Namespace) -> tuple[float, float]:
    """Measure the seconds of the forward pass and of the step."""
    autocast = torch.autocast(args.device, torch.bfloat16) if args.lora_fp32 else nullcontext()
    forward_seconds = step_seconds = 0.0
    for module, inputs in modules:
        start = read_clock(args)
        with autocast:
            output = module(**inputs).last_hidden_state
        forward_end = read_clock(args)
        output.float().mean().backward()
        forward_seconds, step_seconds = forward_seconds + forward_end - start, step_seconds + read_clock(args) - start
        del output
        module.zero_grad()
        for value in inputs.values():
            value.grad = None
    return forward_seconds, step_seconds


def read_clock(args: argparse.Namespace) -> float:
    """Wait for the device, then return the time."""
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


@exit_on_user_error
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", type=int, default=2, help="LLM layers (default: %(default)s)")
    parser.add_argument("--width", type=int, default=896, help="of the LLM, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the LLM (default: %(default)s)")
    parser.add_argument("--vit", type=int, default=1, help="vision encoder layers (default: %(default)s)")
    parser.add_argument("--vit_width", type=int, default=1024, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--tiles", type=int, default=1, help="tiles of 1025 patches (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.05, help="LoRA dropout (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--lora_fp32", action="store_true", help="float32 adapters under bfloat16 autocast")
    parser.add_argument("--grad_checkpoint", action="store_true", help="gradient checkpointing in all layers")
    parser.add_argument("--steps", type=int, default=9, help="measured steps after one warm-up (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads per contender")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    tasks = {name: vars(args) | {"name": name} for name in CONTENDERS}
    measured = measure_in_turns("internvl.tools.benchmark_lora:start_contender", tasks, [{}] * args.steps)
    steps = {name: measurement.list_values("step") for name, measurement in measured.items()}
    print(f"{'adapters':10}{'forward (s)':>24}{'step (s)':>24}{'times as long as none':>24}{'memory (MB)':>14}")
    for name, measurement in measured.items():
        intervals = (
            format_interval(compute_median_interval(measurement.list_values("forward")), ".3f"),
            format_interval(compute_median_interval(steps[name]), ".3f"),
            format_interval(compare_turns(steps[name], steps["none"])),
        )
        print(f"{name:10}{''.join(f'{text:>24}' for text in intervals)}{measurement.facts['peak_mb']:14.0f}")
    costs = {
        name: compute_median_interval([a - b for a, b in zip(steps[name], steps["none"], strict=True)])
        for name in ("ours", "peft")
    }
    print(
        f"ours: {format_interval(compare_turns(steps['peft'], steps['ours']))} times as fast as peft; adapters take "
        f"{format_interval(costs['ours'], '.3f', ' s')} instead of {format_interval(costs['peft'], '.3f', ' s')}"
    )


if __name__ == "__main__":
    sys.exit(main())
