"""Benchmark gradient checkpointing, frozen and compiled layers in a training step.

    python tools/benchmark_checkpointing.py [--variants NAME ...]

Builds a small chat model with random weights and LoRA in vision encoder and LLM. The variants take turns: each runs
forward and backward on the same packed row with images, without an optimizer. Times are medians with their 95 %
interval, also relative to the first variant in the same turn. The first step compiles and is reported separately.
Memory is the peak of the second step beyond weights, adapters, inputs and the compiler: on a CUDA device what torch has
allocated, otherwise the resident memory of the process.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from internvl.command_line import exit_on_user_error
from internvl.constants import IGNORE_INDEX
from internvl.metrics.step_metrics import get_peak_memory
from internvl.model.activation_checkpointing import apply_gradient_checkpointing, compile_layers
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.varlen_attention import use_varlen_attention
from internvl.tools.benchmark.memory import reset_peak_memory
from internvl.tools.benchmark.turns import compare_turns, compute_median_interval, format_interval, measure_in_turns

VOCAB_SIZE, IMAGE_TOKEN_ID = 8000, 7
IMAGE_SIZE, TILE_TOKENS = 224, 64  # pixels of a tile's side; image tokens of a tile: (224 / 14 / 2) ** 2
NUM_DOCUMENTS = 4  # in the row
LORA_RANK = 16


class Variant(NamedTuple):
    """Options of the layers of vision encoder and LLM."""

    checkpoint_ratio: float = 0.0  # --grad_checkpoint_ratio; 0: no gradient checkpointing
    checkpoint_keep: str = "none"  # --grad_checkpoint_keep
    vision: str = "adapters"  # trainable in the vision encoder: "adapters", "last layer" or "frozen"
    compiled: bool = False  # --compile


VARIANTS = {
    "no checkpointing": Variant(),
    "all layers": Variant(1),
    "every 2nd layer": Variant(0.5),
    "all, keep attention": Variant(1, "attention"),
    "all, keep matmul": Variant(1, "matmul"),
    "no checkpointing, vision frozen": Variant(vision="frozen"),
    "all layers, vision frozen": Variant(1, vision="frozen"),
    "no checkpointing, last vision layer": Variant(vision="last layer"),
    "no checkpointing, compiled": Variant(compiled=True),
}


def build_model(variant: Variant, args: argparse.Namespace) -> InternVLChatModel:
    """Build the model of a variant, with the same weights for all."""
    torch.manual_seed(0)
    shape = {"hidden_size": args.width, "num_hidden_layers": args.layers, "num_attention_heads": args.width // 64}
    vision = shape | {
        "intermediate_size": 4 * args.width,
        "image_size": IMAGE_SIZE,
        "patch_size": 14,
        "qkv_bias": True,
    }
    llm = shape | {
        "intermediate_size": 3 * args.width,
        "vocab_size": VOCAB_SIZE,
        "architectures": ["Qwen2ForCausalLM"],
        "num_key_value_heads": max(1, args.width // 128),
        "max_position_embeddings": args.tokens,
    }
    config = InternVLChatConfig(vision, llm, template="internvl2_5", force_image_size=IMAGE_SIZE)
    model = InternVLChatModel(config).to(args.device, getattr(torch, args.dtype)).requires_grad_(False).train()
    model.img_context_token_id = IMAGE_TOKEN_ID
    use_varlen_attention(model.language_model, packed=True)
    if variant.vision == "adapters":
        model.wrap_backbone_lora(LORA_RANK, 2 * LORA_RANK)
    elif variant.vision == "last layer":
        model.vision_model.encoder.layers[-1:].requires_grad_(True)
    model.wrap_llm_lora(LORA_RANK, 2 * LORA_RANK)
    # Remove PEFT's hook on the embeddings, with which frozen layers would build a graph.
    model.language_model.get_base_model().disable_input_require_grads()
    for part in (model.vision_model, model.language_model):
        apply_gradient_checkpointing(part, variant.checkpoint_ratio, variant.checkpoint_keep)
        if variant.compiled:
            compile_layers(part)
    return model


def make_row(model: InternVLChatModel, args: argparse.Namespace) -> dict:
    """Make a packed row of four documents of equal length.

    Each has a quarter of the tiles. The last fifth of its tokens are loss tokens.
    """
    generator = torch.Generator().manual_seed(0)
    length, num_tiles = args.tokens // NUM_DOCUMENTS, args.tiles // NUM_DOCUMENTS
    input_ids = torch.randint(10, VOCAB_SIZE, (NUM_DOCUMENTS, length), generator=generator)
    input_ids[:, 1 : 1 + num_tiles * model.num_image_token] = IMAGE_TOKEN_ID
    labels = input_ids.masked_fill(torch.arange(length) < length * 4 // 5, IGNORE_INDEX)
    pixels = torch.randn(args.tiles, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(getattr(torch, args.dtype))
    row = {
        "input_ids": input_ids.view(1, -1),  # (1, L)
        "labels": labels.view(1, -1),
        "position_ids": torch.arange(length).repeat(NUM_DOCUMENTS)[None],
        "pixel_values": pixels,  # (T, 3, 224, 224)
    }
    row = {name: tensor.to(args.device) for name, tensor in row.items()}
    return row | {"cu_seqlens": [length * number for number in range(NUM_DOCUMENTS + 1)]}


def start_variant(name: str, **settings) -> tuple[dict, Callable[[], dict]]:
    """Build a variant and run two steps.

    Args:
        settings: of the command line.

    Returns:
        `first`, seconds of the first step, its `loss`, and `memory`, the peak of the second in MB; and a function that
        measures the next step: `seconds` and `cpu` (processor seconds, which other programs hardly change).
    """
    args = argparse.Namespace(**settings)
    model = build_model(VARIANTS[name], args)
    row = make_row(model, args)

    def run_step() -> dict:
        model.zero_grad()
        torch.manual_seed(1)
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = model(**row).loss
        loss.backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        return {"seconds": seconds, "cpu": cpu, "loss": loss.item()}

    first = run_step()
    bytes_before = reset_peak_memory(torch.device(args.device))
    run_step()
    memory = (get_peak_memory(torch.device(args.device)) - bytes_before) / 1e6
    return {"first": first["seconds"], "loss": first["loss"], "memory": memory}, run_step


@exit_on_user_error
def main(argv=None):
    args = parse_args(argv)
    tasks = {name: vars(args) | {"name": name} for name in args.variants}
    measured = measure_in_turns(
        "internvl.tools.benchmark_checkpointing:start_variant", tasks, [{}] * args.steps, together=args.device == "cpu"
    )
    reference = measured[args.variants[0]].list_values("seconds")
    print(f"{'variant':36}{'seconds/step':>24}{'relative':>20}{'first step':>12}{'memory (MB)':>13}{'loss':>10}")
    results = {}
    for name, (facts, turns) in measured.items():
        seconds = measured[name].list_values("seconds")
        step, relative = compute_median_interval(seconds), compare_turns(seconds, reference)
        results[name] = facts | {"seconds": step, "relative": relative, "turns": turns}
        columns = f"{format_interval(step, '.3f'):>24}{format_interval(relative):>20}"
        print(f"{name:36}{columns}{facts['first']:12.2f}{facts['memory']:13.0f}{facts['loss']:10.5f}")
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: sizes that do not make a row.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS)
    )
    parser.add_argument("--width", type=int, default=256, help="hidden size, a multiple of 128 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of vision encoder and LLM each (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=1024, help="of the row, more than 64 per tile (default: %(default)s)"
    )
    parser.add_argument(
        "--tiles", type=int, default=4, help="224 x 224 pixels each, a multiple of 4 (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=9, help="measured steps after the first two (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="JSON file for the results")
    args = parser.parse_args(argv)
    num_tiles = args.tiles // NUM_DOCUMENTS
    if args.width % 128 or args.tiles % NUM_DOCUMENTS or args.tokens // NUM_DOCUMENTS <= num_tiles * TILE_TOKENS:
        raise ValueError(
            f"--width {args.width} --tiles {args.tiles} --tokens {args.tokens} is invalid: expected a width that is a "
            f"multiple of 128, a multiple of {NUM_DOCUMENTS} tiles, and more than {TILE_TOKENS} tokens per tile"
        )
    return args


if __name__ == "__main__":
    main()
