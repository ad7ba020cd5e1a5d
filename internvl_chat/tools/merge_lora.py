"""Merges LoRA adapters into the weights: `python tools/merge_lora.py IN OUT` writes a plain checkpoint.

    python tools/merge_lora.py IN OUT [--dtype float32]
    python tools/merge_lora.py IN OUT --adapter DIR=WEIGHT [--adapter ...] [--weight W] [--combination linear]

W + update is computed in fp32 and rounded once. Then the written checkpoint is loaded and asked what the adapted model
was asked before, a picture and a question, and the differences are printed. The two are never in memory together. With
`--adapter`, adapters of other runs on the same base are combined with those of IN, if it has some.
"""

import argparse
from os.path import commonprefix

import torch
from PIL import Image
from transformers import AutoTokenizer

from internvl.command_line import CHAT, checkpoint_folder, command, new_folder
from internvl.data.images import build_transform
from internvl.model.adapter_io import refuse_not_finite
from internvl.model.combine_adapters import COMBINATIONS, combine_adapters, save_merged
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.lora import LORA_RANK_FIELDS, is_peft_model
from internvl.model.tokenizers.loading import load_tokenizer

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
TOKENS = 32  # generated for the comparison


@command
def main(argv=None):
    args = parse(argv)
    source, dtype = checkpoint_folder(args.input_path, CHAT), DTYPES[args.dtype]
    stored = InternVLChatConfig.from_pretrained(source).dtype
    # Rounded once: what is not stored in the dtype asked for is computed with in fp32 until the end.
    compute = dtype if stored == dtype else torch.float32
    model = InternVLChatModel.from_pretrained(source, dtype=compute)
    if args.adapter or args.weight != 1:
        combine_adapters(model, args.adapter, args.weight, args.combination, args.density)
    if not any(is_peft_model(getattr(model, part)) for part in LORA_RANK_FIELDS):
        raise ValueError(f"{source} has no adapters, and no --adapter brings some")
    refuse_not_finite(dict(model.named_parameters()), source)
    tokenizer = load_tokenizer(source)
    with new_folder(args.output_path) as folder:
        adapted = answer(model.eval(), tokenizer)
        merge_adapters(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        refuse_not_finite(dict(model.named_parameters()), f"the sum of weights and adapters in {args.dtype}")
        save_merged(model, source, folder)
        del model, parameter
        merged = answer(InternVLChatModel.from_pretrained(folder, dtype=compute).eval(), tokenizer)
    print(f"merged checkpoint: {args.output_path}")
    print(compared(adapted, merged, compute, dtype))


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input_path", help="chat checkpoint with adapters, or with --adapter any chat checkpoint")
    parser.add_argument("output_path", help="folder for the merged checkpoint, tokenizer included")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights written (%(default)s)")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=folder_and_weight,
        metavar="DIR=WEIGHT",
        help="another run's output or its folder of adapters, and how much it counts; can be repeated",
    )
    parser.add_argument("--weight", type=float, default=1.0, help="how much the adapters of IN count (%(default)s)")
    parser.add_argument(
        "--combination",
        choices=COMBINATIONS,
        default="cat",
        help="PEFT's method for several adapters (%(default)s: the exact sum)",
    )
    parser.add_argument("--density", type=float, default=0.5, help="kept by ties and dare_linear (%(default)s)")
    return parser.parse_args(argv)


def folder_and_weight(text: str) -> tuple[str, float]:
    folder, _, weight = text.rpartition("=")
    try:
        return folder, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not DIR=WEIGHT, such as runs/a=0.5") from None


@torch.inference_mode()
def answer(model: InternVLChatModel, tokenizer: AutoTokenizer) -> tuple[torch.Tensor, list[int]]:
    """Logits (L, V) in fp32 of a prompt with a picture of one tile, and the tokens generated after it, greedily."""
    side = model.config.force_image_size or model.config.vision_config.image_size
    picture = Image.effect_mandelbrot((side, side), (-2, -1.5, 1, 1.5), 50)
    pixels = build_transform(False, side)(picture)[None].to(model.dtype)
    image = f"<img>{'<IMG_CONTEXT>' * model.num_image_token}</img>"
    prompt = model._prompt("<image>\nDescribe this picture.", []).replace("<image>", image)
    inputs = tokenizer(prompt, return_tensors="pt")
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    logits = model(pixels, inputs.input_ids, inputs.attention_mask).logits[0].float()
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    return logits, model.generate(pixels, **inputs, **settings)[0].tolist()


def compared(adapted, merged, compute: torch.dtype, dtype: torch.dtype) -> str:
    """Both differences in words."""
    (logits, tokens), (new_logits, new_tokens) = adapted, merged
    difference, largest = (logits - new_logits).abs().max().item(), logits.abs().max().item()
    same = len(commonprefix([tokens, new_tokens]))
    which = "the same" if tokens == new_tokens else f"the same up to token {same}, then different"
    why = "" if dtype == torch.float32 else f"; that is what rounding the merged weights to {_name(dtype)} costs"
    return (
        f"adapted and merged model on a picture and a question, computed in {_name(compute)}:\n"
        f"  logits differ by {difference:.2g} at most (they reach {largest:.3g}){why}\n"
        f"  {len(new_tokens)} tokens generated greedily: {which}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
