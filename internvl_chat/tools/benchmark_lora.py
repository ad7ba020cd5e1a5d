"""Measures what adapters cost a step: none, PEFT's own layer, and ours, on random weights.

    python tools/benchmark_lora.py                                  # on two CPU cores, under a minute
    python tools/benchmark_lora.py --dtype bf16 --llm 24 --vit 24 --tokens 8192 --tiles 12   # on a GPU

Layers of Qwen2 and blocks of InternViT, frozen, run forward and backward. Each contender is a process of its own; they
take turns, a step each. Without adapters the gradient still goes through all layers to their input. Peak memory is what
a step adds to the weights.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from tools.benchmark.memory import start_counting_memory
from torch import nn
from transformers import Qwen2Config, Qwen2Model

from internvl.command_line import command
from internvl.metrics.step_timer import peak_memory
from internvl.model.internvl_chat.configuration_intern_vit import InternVisionConfig
from internvl.model.internvl_chat.modeling_intern_vit import InternVisionModel
from internvl.model.lora import LLM_TARGETS, VISION_TARGETS, LoraSettings, LoraTargets, add_adapters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def by_peft(module: nn.Module, settings: LoraSettings, targets: LoraTargets) -> nn.Module:
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets.modules
    )
    return get_peft_model(module, config)


CONTENDERS = {
    "none": lambda module, settings, targets: module.requires_grad_(False),
    "peft": by_peft,
    "ours": add_adapters,
}


def towers(name: str, args: argparse.Namespace) -> list[tuple[nn.Module, dict]]:
    """Each tower with its adapters, and its input (tokens, pixels), which asks for a gradient, too."""
    torch.manual_seed(0)
    llm = Qwen2Config(
        vocab_size=8,
        hidden_size=args.width,
        intermediate_size=args.width * 19 // 7,
        num_hidden_layers=args.llm,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        use_cache=False,
    )
    vit = InternVisionConfig(
        hidden_size=args.vit_width,
        intermediate_size=4 * args.vit_width,
        num_hidden_layers=args.vit,
        num_attention_heads=args.vit_width // 64,
        qk_normalization=False,
        use_flash_attn=False,
    )
    texts, pictures = torch.randn(1, args.tokens, args.width), torch.randn(args.tiles, 3, 448, 448)
    settings, dtype, found = LoraSettings(args.rank, 2 * args.rank, args.dropout), DTYPES[args.dtype], []
    for kind, config, targets, key, value in (
        (Qwen2Model, llm, LLM_TARGETS["Qwen2ForCausalLM"], "inputs_embeds", texts),
        (InternVisionModel, vit, VISION_TARGETS, "pixel_values", pictures),
    ):
        module = kind(config).to(args.device, dtype).train()
        if args.grad_checkpoint:
            module.gradient_checkpointing_enable({"use_reentrant": False})
        module = CONTENDERS[name](module, settings, targets)
        for parameter in module.parameters():
            if parameter.requires_grad:  # PEFT makes them fp32, DeepSpeed what the model is
                parameter.data = parameter.data.to(torch.float32 if args.lora_fp32 else dtype)
        found.append((module, {key: value.to(args.device, dtype).requires_grad_()}))
    return found


def contend(name: str, args: argparse.Namespace, pipe):
    """Runs a step whenever the pipe says so, and answers (seconds forward, seconds in all); at last MB."""
    torch.set_num_threads(args.threads)
    modules = towers(name, args)
    before = start_counting_memory(torch.device(args.device))
    while pipe.recv():
        pipe.send(step(modules, args))
    pipe.send((peak_memory(torch.device(args.device)) - before) / 1e6)


def step(modules: list[tuple[nn.Module, dict]], args: argparse.Namespace) -> tuple[float, float]:
    autocast = torch.autocast(args.device, torch.bfloat16) if args.lora_fp32 else nullcontext()
    forward = total = 0.0
    for module, inputs in modules:
        start = clock(args)
        with autocast:
            output = module(**inputs).last_hidden_state
        middle = clock(args)
        output.float().mean().backward()
        forward, total = forward + middle - start, total + clock(args) - start
        del output
        module.zero_grad()
        for value in inputs.values():
            value.grad = None
    return forward, total


def clock(args: argparse.Namespace) -> float:
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(args: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """Contender -> median seconds forward, of a step, and MB."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    for name in CONTENDERS:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=contend, args=(name, args, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a contender that dies ends the benchmark
    times = {name: [] for name in CONTENDERS}
    for _ in range(args.steps + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            times[name].append(pipe.recv())
    found = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        forward, total = (statistics.median(column) for column in zip(*times[name][1:], strict=True))  # one to warm up
        found[name] = forward, total, pipe.recv()
    for process in processes:
        process.join()
    return found


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", type=int, default=2, help="decoder layers (default: %(default)s)")
    parser.add_argument("--width", type=int, default=896, help="of the decoder, times 64 (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="that the decoder reads (default: %(default)s)")
    parser.add_argument("--vit", type=int, default=1, help="vision blocks (default: %(default)s)")
    parser.add_argument("--vit_width", type=int, default=1024, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--tiles", type=int, default=1, help="of 1025 vision tokens (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--lora_fp32", action="store_true", help="fp32 adapters, by autocast in bf16")
    parser.add_argument("--grad_checkpoint", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help="measured, behind one to warm up (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    found = measure(args)
    base = found["none"][1]
    print(f"{'adapters':10}{'forward':>10}{'step':>10}{'adapters':>10}{'memory':>12}")
    for name, (forward, total, memory) in found.items():
        print(f"{name:10}{forward:8.3f} s{total:8.3f} s{(total - base) / total:10.1%}{memory:9.0f} MB")
    peft, ours = found["peft"], found["ours"]
    print(
        f"ours: {peft[1] / ours[1]:.2f} times as fast, what adapters cost {ours[1] - base:.3f} s instead of "
        f"{peft[1] - base:.3f} s, {ours[2] / peft[2]:.0%} of the memory"
    )


if __name__ == "__main__":
    sys.exit(main())
