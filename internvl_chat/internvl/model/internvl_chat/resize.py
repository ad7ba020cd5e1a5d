"""Changing the sizes of a loaded model: rows of the token embeddings, pixels of a tile.

Under ZeRO-3, where every rank holds a slice of each weight, all ranks call these together and each gathers what it
touches. What is added follows from what is there, so that it need not be stored.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.model.lora import unwrap_peft


def gathered_parameters(*parameters: nn.Parameter) -> AbstractContextManager:
    """Inside it the parameters are there as a whole and may be changed, by all ranks alike, also under ZeRO-3."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def resize_tokens(model, rows: int, known: int | None = None):
    """Gives both token embeddings `rows` rows; those behind the first `known` (default: all) are the mean of these."""
    llm = unwrap_peft(model.language_model)
    known = llm.get_input_embeddings().num_embeddings if known is None else known
    llm.resize_token_embeddings(rows, mean_resizing=False)
    for weight in (llm.get_input_embeddings().weight, llm.get_output_embeddings().weight):
        with gathered_parameters(weight), torch.no_grad():
            weight[known:] = weight[:known].float().mean(dim=0, keepdim=True).to(weight.dtype)
    model.config.llm_config.vocab_size = llm.config.vocab_size = rows


def resize_image(model, size: int):
    """Fits the model to tiles of `size` pixels: position embeddings, both configs and the number of image tokens."""
    vision = unwrap_peft(model.vision_model)
    patch, old_size = vision.config.patch_size, vision.config.image_size
    step = patch * round(1 / model.downsample_ratio)
    if size < step or size % step:
        raise ValueError(f"a tile of {size} pixels does not divide into image tokens of {step} pixels")
    if size != old_size:
        with gathered_parameters(vision.embeddings.position_embedding):
            vision.resize_pos_embeddings(old_size, size, patch)
    model.config.vision_config.image_size = vision.config.image_size = size
    model.config.force_image_size = size
    model.num_image_token = count_image_tokens(model.config)
