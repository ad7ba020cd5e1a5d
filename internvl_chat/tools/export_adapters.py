"""Export the LoRA adapters of a chat model as one PEFT adapter.

    internvl export IN OUT [--layout chat] [--write_base DIR] [--parts PART ...] [--base NAME]

Layouts:

- hf: `PeftModel.from_pretrained(hf_model, OUT)` is the adapted model, where `hf_model` is the base model that
  `internvl convert to-hf` writes. vLLM adapts only the LLM there: pass `--parts language_model` for it.
- chat: the names of InternVLChatModel, for vLLM, which adapts the vision encoder and the LLM there, and for
  `PeftModel.from_pretrained(InternVLChatModel.from_pretrained(BASE), OUT)`.

The adapter belongs to the run's model without these adapters. That is not always the run's base checkpoint: the run may
have trained other weights, or changed the image size. `--write_base` saves it, in the chat layout.
"""

import argparse
import os
import shlex
from contextlib import nullcontext
from pathlib import Path

from safetensors.torch import save_file

from internvl.command_line import CHAT_MODEL_TYPE, create_output_dir, exit_on_user_error, require_checkpoint_dir
from internvl.model.adapter_io import read_part_adapter, require_finite
from internvl.model.auxiliary_files import describe_ignored_by_engines
from internvl.model.chat_adapter import VLLM_LORA_RANKS, convert_adapters_to_chat
from internvl.model.code_files import add_remote_code_flag, find_remote_code
from internvl.model.combine_adapters import save_merged_checkpoint
from internvl.model.hf.adapter import convert_adapters_to_hf
from internvl.model.hf.config import convert_config_to_hf
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import ADAPTER_FILE, TRAINED_TENSORS_FILE
from internvl.model.internvl_chat.merge import merge_adapters, remove_adapter_fields
from internvl.model.lora import LORA_RANK_FIELDS
from internvl.regular_files import read_json_object
from internvl.tool_parser import ToolParser

# Fields of config.json that change what the model computes or how its inputs are made.
COMPARED_FIELDS = (
    *("template", "system_message", "force_image_size", "dynamic_image_size", "min_dynamic_patch", "max_dynamic_patch"),
    *("use_thumbnail", "pad2square", "select_layer", "downsample_ratio", "ps_version"),
)


@exit_on_user_error
def main(argv=None):
    args = parse_args(argv)
    source = require_checkpoint_dir(args.input_path, CHAT_MODEL_TYPE)
    run_config = InternVLChatConfig.from_pretrained(source)
    available = {part: adapter for part in LORA_RANK_FIELDS if (adapter := read_part_adapter(source, part, run_config))}
    # With --write_base, the chat layout's base gets the projector's adapters, which vLLM has no place for.
    default = [part for part in available if not (part == "mlp1" and args.layout == "chat" and args.write_base)]
    requested = args.parts or default or list(LORA_RANK_FIELDS)
    if missing := [part for part in requested if part not in available]:
        raise ValueError(f"{source} has no adapters of {', '.join(missing)}")
    # The adapter has the scale of the first part. With the LLM first, its adapter stays unchanged.
    adapters = {part: available[part] for part in reversed(LORA_RANK_FIELDS) if part in requested}
    differences = list_base_differences(source, run_config)
    ignored_note = describe_ignored_by_engines(run_config, source, is_hf_layout=args.layout == "hf")
    base = args.base or args.write_base or (getattr(run_config, "base_model", None) or {}).get("path")
    config = remove_adapter_fields(run_config)
    if args.layout == "chat":
        settings, tensors = convert_adapters_to_chat(adapters, config)
    else:
        hf_config = convert_config_to_hf(config, image_token_id=0, is_tied=False)
        settings, tensors = convert_adapters_to_hf(adapters, config.llm_config, hf_config)
    settings.base_model_name_or_path = args.base or args.write_base
    require_finite(tensors, source)
    base_context = create_output_dir(args.write_base) if args.write_base else nullcontext()
    with create_output_dir(args.output_path) as output_dir, base_context as base_dir:
        save_file(tensors, output_dir / ADAPTER_FILE, metadata={"format": "pt"})
        settings.save_pretrained(str(output_dir))
        if base_dir:
            write_base(source, requested, base_dir, args.with_remote_code)
    print(f"PEFT adapter: {output_dir}")
    print(f"LoRA rank: {settings.r}")
    print(f"Parts: {', '.join(adapters)}")
    print_base(args.write_base, differences, skipped=[part for part in available if part not in requested])
    print_serving(args, base, requested, settings.r)
    if ignored_note:
        print(f"Note: {ignored_note}")


def parse_args(argv) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("input_path", help="chat checkpoint with adapters")
    parser.add_argument("output_path", help="new folder for the PEFT adapter")
    parser.add_argument(
        "--layout", choices=("hf", "chat"), default="hf", help="names of the adapted layers (default: %(default)s)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=LORA_RANK_FIELDS, help="parts whose adapters are exported (default: all)"
    )
    parser.add_argument(
        "--write_base",
        metavar="DIR",
        help="new folder for the base model, with the run's other trained weights and the adapters of the other parts",
    )
    add_remote_code_flag(parser)
    parser.add_argument("--base", help="base model to record in adapter_config.json: a folder or a hub name")
    args = parser.parse_args(argv)
    if args.with_remote_code and not args.write_base:
        raise ValueError("--with_remote_code writes into the base model: pass --write_base DIR, too")
    if args.write_base:
        output, base = (Path(os.path.realpath(path)) for path in (args.output_path, args.write_base))
        if output.is_relative_to(base) or base.is_relative_to(output):
            raise ValueError(
                f"the output folder {args.output_path} and --write_base {args.write_base} are the same or inside each "
                "other: choose two separate folders"
            )
    return args


def list_base_differences(source: Path, config: InternVLChatConfig) -> list[str]:
    """List what the run changed in its base checkpoint, besides its adapters."""
    base = getattr(config, "base_model", None) or {}
    differences = []
    if (source / TRAINED_TENSORS_FILE).is_file():
        differences.append(f"the run also trained other weights ({TRAINED_TENSORS_FILE})")
    if base.get("merged"):
        differences.append("the adapters of the base checkpoint were merged first")
    if base.get("known_tokens"):
        differences.append("tokens were added to its vocabulary")
    base_file = Path(base.get("path") or "", "config.json")
    if base_file.is_file():
        before, after = read_json_object(base_file), config.to_dict()
        changed = [name for name in COMPARED_FIELDS if before.get(name, after.get(name)) != after.get(name)]
        differences += [f"{name} was {before[name]!r:.80} and is {after[name]!r:.80}" for name in changed]
    return differences


def write_base(source: Path, exported_parts: list[str], output_dir: Path, with_remote_code: bool) -> None:
    """Save the run's model without the exported adapters; others are merged."""
    model = InternVLChatModel.from_pretrained(source, dtype=InternVLChatConfig.from_pretrained(source).dtype)
    for part in exported_parts:
        setattr(model, part, getattr(model, part).unload())
    save_merged_checkpoint(merge_adapters(model), source, output_dir, with_remote_code)


def print_base(written_base: str | None, differences: list[str], skipped: list[str]) -> None:
    """Print which base model the adapter belongs to, if it is not the run's base checkpoint."""
    if written_base:
        print(f"Base model: {written_base}" + (f" (merged into it: {', '.join(skipped)})" if skipped else ""))
        return
    differences = [*differences, *(f"the adapters of {part} are not exported" for part in skipped)]
    if differences:
        print(f"Note: the base checkpoint is not the run's model without these adapters: {'; '.join(differences)}.")
        print("      Pass --write_base DIR to save that model, or merge everything with `internvl merge`.")


def print_serving(args: argparse.Namespace, base: str | None, parts: list[str], rank: int) -> None:
    """Print how vLLM serves the adapter."""
    if args.layout == "hf" and parts != ["language_model"]:
        print("Note: vLLM adapts only the LLM in this layout: pass --parts language_model, or --layout chat.")
        return
    flags = ["--enable-lora"]
    if args.layout == "chat":
        flags = ["--trust-remote-code", *flags] + ["--enable-tower-connector-lora"] * ("vision_model" in parts)
    max_rank = next((allowed for allowed in VLLM_LORA_RANKS if allowed >= rank), rank)
    flags += ["--max-lora-rank", str(max_rank), "--lora-modules", f"adapted={args.output_path}"]
    model = (base or "BASE") if args.layout == "chat" else (args.base or "HF_BASE")
    if args.layout == "hf" and not args.base:
        convert_flags = shlex.join(["--custom_path", base or "BASE", "--save_path", model])
        print(f"{model} is written by internvl convert to-hf {convert_flags}")
    print(f"vLLM: {shlex.join(['vllm', 'serve', model, *flags])}")
    if args.layout == "chat" and Path(model, "config.json").is_file() and not find_remote_code(Path(model)):
        print(f"Note: {model} has no code files, which vLLM requires: write them with `internvl convert remote-code`.")


if __name__ == "__main__":
    main()
