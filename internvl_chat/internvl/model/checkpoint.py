"""What is done to a whole chat model outside training: adapters saved or merged, tokens added, tiles resized.

Used by `train/build.py`, the trainer and `tools/`.
"""

from pathlib import Path

import torch
from torch import nn

from .internvl_chat import InternVLChatModel
from .lora import is_wrapped, plain

# A part that can be wrapped, and the field of the config that holds its rank.
PARTS = {"vision_model": "use_backbone_lora", "language_model": "use_llm_lora"}


def save_adapters(model: InternVLChatModel, folder: str | Path, state_dict: dict | None = None) -> list[Path]:
    """Writes the adapters of each wrapped part to `folder/vision_model`, `folder/language_model`, in PEFT's format.

    Args:
        state_dict: the whole model's, where the parameters themselves are partitioned (ZeRO-3).
    """
    wrapped = {part: getattr(model, part) for part in PARTS if is_wrapped(getattr(model, part))}
    for part, module in wrapped.items():
        prefix = f"{part}."
        own = {k.removeprefix(prefix): v for k, v in (state_dict or {}).items() if k.startswith(prefix)} or None
        module.save_pretrained(Path(folder) / part, state_dict=own, save_embedding_layers=False)
    return [Path(folder) / part for part in wrapped]


def merge_adapters(model: InternVLChatModel) -> InternVLChatModel:
    """Adds the adapters into the weights they adapt, in place: a plain model, and a config that says so."""
    for part, rank in PARTS.items():
        if is_wrapped(getattr(model, part)):
            setattr(model, part, getattr(model, part).merge_and_unload())
        setattr(model.config, rank, 0)
    return model


def add_special_tokens(model: InternVLChatModel, tokenizer, tokens: list[str]) -> int:
    """Adds those of `tokens` that the tokenizer lacks, and their rows to both embeddings: the mean of the old rows.

    Embeddings of published models have more rows than the tokenizer has tokens; they are resized, as upstream's, only
    if something was added, and then to the length of the tokenizer. Returns the number of tokens added.
    """
    added = tokenizer.add_tokens(list(tokens), special_tokens=True)
    if not added:
        return 0
    llm = plain(model.language_model)
    llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for embeddings in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        _fill_with_mean(embeddings.weight, added)
    model.config.llm_config.vocab_size = llm.config.vocab_size = len(tokenizer)
    return added


@torch.no_grad()
def _fill_with_mean(weight: nn.Parameter, rows: int):
    weight[-rows:] = weight[:-rows].float().mean(dim=0, keepdim=True).to(weight.dtype)


def resize_image(model: InternVLChatModel, size: int):
    """Fits the model to tiles of `size` pixels: position embeddings, both configs and the number of image tokens."""
    vision = plain(model.vision_model)
    patch = vision.config.patch_size
    if size % (step := patch * round(1 / model.downsample_ratio)):
        raise ValueError(f"a tile of {size} pixels does not divide into image tokens of {step} pixels")
    vision.resize_pos_embeddings(vision.config.image_size, size, patch)
    model.config.vision_config.image_size = vision.config.image_size = size
    model.config.force_image_size = size
    model.num_image_token = int((size // patch) ** 2 * model.downsample_ratio**2)
