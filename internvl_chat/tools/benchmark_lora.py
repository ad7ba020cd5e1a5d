"""Benchmark the cost of LoRA in a step: PEFT's layers and ours.

    python tools/benchmark_lora.py                                  # two CPU cores, under a minute
    python tools/benchmark_lora.py --dtype bf16 --llm 24 --vit 24 --tokens 8192 --tiles 12   # on a GPU

Frozen Qwen2 layers and InternViT layers with random weights run forward and backward. The contenders are processes that
run one step each by turns, so other programs on the machine slow down all of them alike. Without adapters, gradients
still flow through all layers to their input. Peak memory is counted beyond the weights.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from tools.benchmark.memory import reset_peak_memory
from torch import nn
from transformers import Qwen2Config, Qwen2Model

from internvl.command_line import exit_on_user_error
from internvl.metrics.step_metrics import get_peak_memory
from internvl.model.internvl_chat.configuration_intern_vit import InternVisionConfig
from internvl.model.internvl_chat.modeling_intern_vit import InternVisionModel
from internvl.model.lora import LLM_TARGETS, VISION_TARGETS, LoraSettings, LoraTargets, add_adapters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LoraCost(NamedTuple):
    """Median times of the forward pass and step, and peak memory."""

    forward_seconds: float
    step_seconds: float
    peak_mb: float


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


def run_contender(name: str, args: argparse.Namespace, pipe):
    """Run and time steps on request of the parent process.

    For each True received, runs a step and sends (forward seconds, step seconds). For False, sends the peak memory (MB)
    and returns.
    """
    torch.set_num_threads(args.threads)
    modules = build_modules(name, args)
    bytes_before = reset_peak_memory(torch.device(args.device))
    while pipe.recv():
        pipe.send(time_step(modules, args))
    pipe.send((get_peak_memory(torch.device(args.device)) - bytes_before) / 1e6)


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


def measure_contenders(args: argparse.Namespace) -> dict[str, LoraCost]:
    """Measure all contenders in turn, each in its own process."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name in CONTENDERS:
        pipes[name], child_pipe = context.Pipe()
        processes.append(context.Process(target=run_contender, args=(name, args, child_pipe), daemon=True))
        processes[-1].start()
        child_pipe.close()  # now recv() raises EOFError if the child process exits
    times = {name: [] for name in CONTENDERS}
    for _ in range(args.steps + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            times[name].append(pipe.recv())
    costs = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        forward, step = (statistics.median(column) for column in zip(*times[name][1:], strict=True))  # [0] is warm-up
        costs[name] = LoraCost(forward, step, pipe.recv())
    for process in processes:
        process.join()
    return costs


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
    parser.add_argument("--steps", type=int, default=5, help="measured steps after one warm-up (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads per contender")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    costs = measure_contenders(args)
    none, peft, ours = (costs[name] for name in ("none", "peft", "ours"))
    print(f"{'adapters':10}{'forward':>10}{'step':>10}{'share':>10}{'memory':>12}")
    for name, cost in costs.items():
        share = (cost.step_seconds - none.step_seconds) / cost.step_seconds
        print(f"{name:10}{cost.forward_seconds:8.3f} s{cost.step_seconds:8.3f} s{share:10.1%}{cost.peak_mb:9.0f} MB")
    print(
        f"ours: {peft.step_seconds / ours.step_seconds:.2f} times as fast as peft; adapters take "
        f"{ours.step_seconds - none.step_seconds:.3f} s instead of {peft.step_seconds - none.step_seconds:.3f} s; "
        f"{ours.peak_mb / peft.peak_mb:.0%} of the memory"
    )


if __name__ == "__main__":
    sys.exit(main())
