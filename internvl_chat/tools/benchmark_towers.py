"""Measures ways to run the towers in a training step: checkpoints, frozen layers, compiled layers; time and memory.

`python tools/benchmark_towers.py` makes a small chat model of random weights with LoRA in both towers, and runs each
way in a process of its own on the same packed row with pictures: forward and backward, no optimizer. The first step,
which compiles, is told apart. Memory is the peak during the steps after it, beyond what lay there before them: weights,
adapters, inputs, the compiler. On a CUDA device it is what torch allocated, otherwise what the process had.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tools.benchmark.memory import start_counting_memory

from internvl.command_line import command
from internvl.metrics.step_timer import peak_memory
from internvl.model.activation_checkpointing import apply_gradient_checkpointing, compile_layers
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.varlen_attention import use_varlen_attention

VOCABULARY, IMAGE = 8000, 7  # the id of an image token
RANK = 16


class Way(NamedTuple):
    every: int = 0
    keep: str = "none"
    vision: str = "adapters"
    compiled: bool = False


WAYS = {
    "no checkpoints": Way(),
    "all layers": Way(1),
    "every 2nd layer": Way(2),
    "all, keep attention": Way(1, "attention"),
    "all, keep matmul": Way(1, "matmul"),
    "no checkpoints, vision frozen": Way(vision="frozen"),
    "all layers, vision frozen": Way(1, vision="frozen"),
    "no checkpoints, last vision layer": Way(vision="last layer"),
    "no checkpoints, compiled": Way(compiled=True),
}


def build(way: Way, args: argparse.Namespace) -> InternVLChatModel:
    """Random weights, the same for each way; what trains is as it says, and adapters in the language model."""
    torch.manual_seed(0)
    shape = {"hidden_size": args.width, "num_hidden_layers": args.layers, "num_attention_heads": args.width // 64}
    vision = {**shape, "intermediate_size": 4 * args.width, "image_size": 224, "patch_size": 14, "qkv_bias": True}
    llm = {
        **shape,
        "intermediate_size": 3 * args.width,
        "vocab_size": VOCABULARY,
        "architectures": ["Qwen2ForCausalLM"],
    }
    llm |= {"num_key_value_heads": max(1, args.width // 128), "max_position_embeddings": args.tokens}
    config = InternVLChatConfig(vision, llm, template="internvl2_5", force_image_size=224)
    model = InternVLChatModel(config).to(args.device, getattr(torch, args.dtype)).requires_grad_(False).train()
    model.img_context_token_id = IMAGE
    use_varlen_attention(model.language_model, packed=True)
    if way.vision == "adapters":
        model.wrap_backbone_lora(RANK, 2 * RANK)
    elif way.vision == "last layer":
        model.vision_model.encoder.layers[-1:].requires_grad_(True)
    model.wrap_llm_lora(RANK, 2 * RANK)
    model.language_model.get_base_model().disable_input_require_grads()
    for tower in (model.vision_model, model.language_model):
        apply_gradient_checkpointing(tower, way.every, way.keep)
        if way.compiled:
            compile_layers(tower)
    return model


def row(model: InternVLChatModel, args: argparse.Namespace) -> dict:
    """Four documents of equal length, in each the image tokens of a quarter of the tiles; a fifth of it is trained."""
    generator = torch.Generator().manual_seed(0)
    length, tiles = args.tokens // 4, args.tiles // 4
    ids = torch.randint(10, VOCABULARY, (4, length), generator=generator)
    ids[:, 1 : 1 + tiles * model.num_image_token] = IMAGE
    labels = ids.masked_fill(torch.arange(length) < length * 4 // 5, -100)
    positions = torch.arange(length).repeat(4)[None]
    pixels = torch.randn(4 * tiles, 3, 224, 224, generator=generator).to(getattr(torch, args.dtype))
    inputs = {"input_ids": ids.view(1, -1), "labels": labels.view(1, -1), "position_ids": positions}
    inputs = {name: tensor.to(args.device) for name, tensor in (inputs | {"pixel_values": pixels}).items()}
    return inputs | {"cu_seqlens": [length * number for number in range(5)]}


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(way: Way, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the first step, the median of the others (and of the processor's, which other programs hardly change),
    their peak memory in MB, and the first loss."""
    model = build(way, args)
    inputs = row(model, args)

    def step() -> tuple[float, float, float]:
        model.zero_grad()
        torch.manual_seed(1)
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = model(**inputs).loss
        loss.backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return loss.item(), time.perf_counter() - start, time.process_time() - start_cpu

    loss, first, _ = step()
    before = start_counting_memory(torch.device(args.device))
    _, seconds, cpu = map(statistics.median, zip(*(step() for _ in range(args.steps)), strict=True))
    memory = (peak_memory(torch.device(args.device)) - before) / 1e6
    return {"seconds": seconds, "cpu": cpu, "first": first, "memory": memory, "loss": loss}


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--width", type=int, default=256, help="hidden size of both towers, in steps of 128")
    parser.add_argument("--layers", type=int, default=4, help="of each tower")
    parser.add_argument("--tokens", type=int, default=1024, help="of the row; a tile is 64 of them")
    parser.add_argument("--tiles", type=int, default=4, help="of the row, of 224 x 224 pixels, in steps of 4")
    parser.add_argument("--steps", type=int, default=5, help="after the first, which is told apart")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="JSON file for the numbers")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # in a process started below
    args = parser.parse_args(argv)
    if args.width % 128 or args.tiles % 4 or args.tokens // 4 <= args.tiles // 4 * 64:
        raise ValueError(
            f"--width {args.width} --tiles {args.tiles} --tokens {args.tokens}: steps of 128 and of 4, and more than "
            "64 tokens a tile."
        )
    if args.alone:
        print(json.dumps(measure(WAYS[args.ways[0]], args)))
        return
    settings = [f"--{name}={getattr(args, name)}" for name in "width layers tokens tiles steps dtype device".split()]
    results = {}
    print(f"{'way':36}{'seconds a step':>15}{'CPU seconds':>13}{'first step':>12}{'memory (MB)':>13}{'loss':>10}")
    for name in args.ways:
        child = [sys.executable, "-W", "ignore::FutureWarning", __file__, *settings, "--alone", "--ways", name]
        done = subprocess.run(child, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise ValueError(f"{name}: the process that measured it ended with status {done.returncode}")
        found = results[name] = json.loads(done.stdout.splitlines()[-1])
        numbers = f"{found['seconds']:15.3f}{found['cpu']:13.3f}{found['first']:12.2f}{found['memory']:13.0f}"
        print(f"{name:36}{numbers}{found['loss']:10.5f}", flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
