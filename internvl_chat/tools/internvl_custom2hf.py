"""Turns a chat checkpoint into one for transformers' own class, `InternVLForConditionalGeneration`.

    python tools/internvl_custom2hf.py --custom_path CHAT --save_path HF [--hf_path REFERENCE]

Tensor for tensor, without building a model; a checkpoint of several files passes through the memory of one. The folder
is complete: `AutoModelForImageTextToText` and `AutoProcessor` read it. A checkpoint with adapters is merged first, as a
whole model, into a temporary folder beside the result. With `--hf_path`, prints how far the result is from that
reference.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForImageTextToText

from internvl.command_line import CHAT, checkpoint_folder, command, new_folder
from internvl.model.adapter_io import has_plain_weights
from internvl.model.combine_adapters import save_merged
from internvl.model.hf.config import to_hf_config
from internvl.model.hf.processor import IMAGE_TOKEN, save_processor
from internvl.model.hf.weights import is_tied, newer_name, to_hf
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.safetensors_io import Checkpoint, Tensors, compute_l2_distance, save_tensors
from internvl.model.tokenizers.loading import load_tokenizer


def convert_keys_to_hf(custom_state_dict: Tensors, llm_config=None) -> dict[str, torch.Tensor]:
    """A chat model's state dict under transformers' names; InternLM2's needs its `llm_config`."""
    return dict(to_hf(custom_state_dict, llm_config))


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--custom_path", required=True, help="chat checkpoint to convert")
    parser.add_argument("--hf_path", help="checkpoint of transformers' class to compare the result with")
    parser.add_argument("--save_path", required=True, help="folder for the converted checkpoint")
    args = parser.parse_args(argv)

    reference = Checkpoint(args.hf_path, newer_name) if args.hf_path else None
    with merged(checkpoint_folder(args.custom_path, CHAT), Path(args.save_path)) as source:
        convert(source, args.save_path)
    print(f"checkpoint of transformers' format: {args.save_path}")
    if reference:
        compute_l2_distance(Checkpoint(args.save_path), reference)


@contextmanager
def merged(source: Path, beside: Path) -> Iterator[Path]:
    """The checkpoint itself, or where it carries adapters a merged copy that is there for a while."""
    if has_plain_weights(InternVLChatConfig.from_pretrained(source)):
        yield source
        return
    beside.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=beside.parent, prefix=".merged-") as folder:
        print("merging its adapters first")
        save_merged(merge_adapters(InternVLChatModel.from_pretrained(source, dtype="auto")), source, folder)
        yield Path(folder)


def convert(source: Path, save_path: str) -> None:
    """Writes the plain chat checkpoint `source` as one of transformers' class."""
    config, custom = InternVLChatConfig.from_pretrained(source), Checkpoint(source)
    stored = config.get_config_dict(source)[0]  # our class unties the head, whatever is stored
    tied = is_tied(custom, declared=any(c.get("tie_word_embeddings") for c in (stored, stored["llm_config"])))
    hf_config = to_hf_config(config, image_token_id(source), tied)
    if config.dynamic_image_size and not config.use_thumbnail:
        print("note: use_thumbnail is False, but transformers' processor adds a thumbnail to several tiles always")
    if config.pad2square:
        print("note: pad2square is True, but transformers' processor does not pad")

    with new_folder(save_path) as folder:
        save_tensors(to_hf(custom, config.llm_config, tied), folder)
        hf_config.save_pretrained(folder)
        save_processor(config, source, folder)
        check(folder)


def image_token_id(path: Path) -> int:
    vocabulary = load_tokenizer(path).get_vocab()
    if IMAGE_TOKEN not in vocabulary:
        raise ValueError(f"the tokenizer in {str(path)!r} lacks the token {IMAGE_TOKEN}: no chat checkpoint")
    return vocabulary[IMAGE_TOKEN]


def check(folder) -> None:
    """ValueError with the names, if transformers finds a tensor too many, too few or of another shape in `folder`."""
    _, info = AutoModelForImageTextToText.from_pretrained(
        folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
    )
    problems = [f"{kind[:-5]}: {sorted(map(str, names))}" for kind, names in info.items() if names]
    if problems:
        raise ValueError(f"transformers' class does not take this model: {'; '.join(problems)}")


if __name__ == "__main__":
    main()
