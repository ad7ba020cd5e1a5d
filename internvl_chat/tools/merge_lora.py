"""Merge LoRA adapters into the weights of a chat checkpoint.

    internvl merge IN OUT [--dtype float32]
    internvl merge IN OUT --adapter DIR=WEIGHT [--adapter ...] [--weight W] [--combination linear]

Weights and adapters are added in float32 and rounded once. Then the merged checkpoint is loaded again, and its logits
and generated tokens for one image and question are compared with the adapted model's. The two models are never in
memory together. --adapter combines adapters of other runs on the same base checkpoint with those of IN, if it has any.
"""

import argparse
from os.path import commonprefix

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from internvl.command_line import CHAT_MODEL_TYPE, create_output_dir, exit_on_user_error, require_checkpoint_dir
from internvl.constants import IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN
from internvl.data.images import build_transform
from internvl.model.adapter_io import require_finite
from internvl.model.auxiliary_files import describe_ignored_by_engines
from internvl.model.code_files import add_remote_code_flag
from internvl.model.combine_adapters import COMBINATION_METHODS, combine_adapters, save_merged_checkpoint
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.configuration_internvl_chat import get_tile_size
from internvl.model.internvl_chat.generation import default_generation_config
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.lora import LORA_RANK_FIELDS, is_peft_model
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tool_parser import ToolParser

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
LOGIT_TOLERANCE = 1e-3  # of merging in float32, relative to the largest logit
MAX_NEW_TOKENS = 32  # generated to compare the adapted with the merged model


@exit_on_user_error
def main(argv=None):
    args = parse_args(argv)
    source, dtype = require_checkpoint_dir(args.input_path, CHAT_MODEL_TYPE), DTYPES[args.dtype]
    stored_dtype = InternVLChatConfig.from_pretrained(source).dtype
    # If the dtype changes, weights are kept in float32 until the end, and rounded only once.
    compute_dtype = dtype if stored_dtype == dtype else torch.float32
    model = InternVLChatModel.from_pretrained(source, dtype=compute_dtype)
    if args.adapter or args.weight != 1:
        combine_adapters(model, args.adapter, args.weight, args.combination, args.density)
    ignored_note = describe_ignored_by_engines(model.config, source)
    if not any(is_peft_model(getattr(model, part)) for part in LORA_RANK_FIELDS):
        raise ValueError(f"{source} has no adapters: add some with --adapter DIR=WEIGHT")
    require_finite(dict(model.named_parameters()), source)
    tokenizer = load_tokenizer(source)
    with create_output_dir(args.output_path) as output_dir:
        adapted_answer = answer_probe(model.eval(), tokenizer)
        merge_adapters(model)
        if compute_dtype == torch.float32:
            require_equal_logits(adapted_answer, answer_probe(model, tokenizer))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        require_finite(dict(model.named_parameters()), f"merged weights in {args.dtype}")
        save_merged_checkpoint(model, source, output_dir, args.with_remote_code)
        del model, parameter  # `parameter` would keep the last one in memory
        merged_model = InternVLChatModel.from_pretrained(output_dir, dtype=compute_dtype).eval()
        merged_answer = answer_probe(merged_model, tokenizer)
    print(f"Merged checkpoint: {args.output_path}")
    print(format_comparison(adapted_answer, merged_answer, compute_dtype, dtype))
    if ignored_note:
        print(f"Note: {ignored_note}")


def parse_args(argv) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("input_path", help="chat checkpoint with adapters; with --adapter any chat checkpoint")
    parser.add_argument("output_path", help="new folder for the merged checkpoint and its tokenizer")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the merged weights (default: %(default)s)"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=parse_adapter,
        metavar="DIR=WEIGHT",
        help="output of another run (or its adapters/) and its weight in the combination; repeatable",
    )
    parser.add_argument("--weight", type=float, default=1.0, help="weight of the adapters of IN (default: %(default)s)")
    parser.add_argument(
        "--combination",
        choices=COMBINATION_METHODS,
        default="cat",
        help="PEFT's method of combining adapters (default: %(default)s, the exact sum)",
    )
    parser.add_argument(
        "--density",
        type=float,
        default=0.5,
        help="fraction of values kept by ties and dare_linear (default: %(default)s)",
    )
    add_remote_code_flag(parser)
    return parser.parse_args(argv)


def parse_adapter(text: str) -> tuple[str, float]:
    folder, _, weight = text.rpartition("=")
    try:
        return folder, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected DIR=WEIGHT such as runs/a=0.5, got {text!r}") from None


@torch.inference_mode()
def answer_probe(model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, list[int]]:
    """Answer a question about an image of one tile.

    Returns:
        logits of the prompt (L, V) in float32, and the greedily generated tokens.
    """
    size = get_tile_size(model.config)
    image = Image.effect_mandelbrot((size, size), (-2, -1.5, 1, 1.5), 50)
    pixel_values = build_transform(False, size)(image)[None].to(model.dtype)  # (1, 3, size, size)
    image_tokens = f"{IMG_START_TOKEN}{IMG_CONTEXT_TOKEN * model.num_image_token}{IMG_END_TOKEN}"
    prompt = model.build_prompt("<image>\nDescribe this image.", []).replace("<image>", image_tokens)
    inputs = tokenizer(prompt, return_tensors="pt")
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    logits = model(pixel_values, inputs.input_ids, inputs.attention_mask).logits[0].float()
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with default_generation_config(model):
        return logits, model.generate(pixel_values, **inputs, **settings)[0].tolist()


def require_equal_logits(adapted_answer, merged_answer) -> None:
    """Raise a ValueError if merging in float32 has changed the logits."""
    logits, merged_logits = adapted_answer[0], merged_answer[0]
    difference, largest = (logits - merged_logits).abs().max().item(), logits.abs().max().item()
    if not difference <= LOGIT_TOLERANCE * largest:
        raise ValueError(
            f"Merging failed: the merged model's logits differ from the adapted model's by {difference:.2g} in "
            f"float32, with logits up to {largest:.3g}."
        )


def format_comparison(adapted_answer, merged_answer, compute_dtype: torch.dtype, dtype: torch.dtype) -> str:
    """Format the differences between two results of `answer_probe`."""
    (logits, tokens), (merged_logits, merged_tokens) = adapted_answer, merged_answer
    difference, largest = (logits - merged_logits).abs().max().item(), logits.abs().max().item()
    num_equal = len(commonprefix([tokens, merged_tokens]))
    equality = "identical" if tokens == merged_tokens else f"the first {num_equal} identical"
    cause = "" if dtype == torch.float32 else f", due to rounding the merged weights to {_name(dtype)}"
    return (
        f"Adapted and merged model on one image and question, computed in {_name(compute_dtype)}:\n"
        f"  Largest logit difference: {difference:.2g}{cause} (largest logit: {largest:.3g})\n"
        f"  Generated tokens: {len(merged_tokens)}, {equality}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
