"""Changing the vocabulary size and the tile size of a loaded model.

Under ZeRO-3, where every rank holds a slice of each parameter, all ranks must call these functions together. New
weights are computed from old ones, so adapter checkpoints do not contain them: loading computes them again.
"""

import torch

from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.model.internvl_chat.zero3 import gathered_parameters
from internvl.model.lora import unwrap_peft


def resize_embeddings(model, num_rows: int, num_known: int | None = None):
    """Resize the input and output embeddings of the LLM to `num_rows` rows.

    Rows after the first `num_known` (default: all old rows) become the mean of these.
    """
    llm = unwrap_peft(model.language_model)
    num_known = llm.get_input_embeddings().num_embeddings if num_known is None else num_known
    llm.resize_token_embeddings(num_rows, mean_resizing=False)
    for weight in (llm.get_input_embeddings().weight, llm.get_output_embeddings().weight):
        with gathered_parameters(weight), torch.no_grad():
            weight[num_known:] = weight[:num_known].float().mean(dim=0, keepdim=True).to(weight.dtype)
    model.config.llm_config.vocab_size = llm.config.vocab_size = num_rows


def check_image_size(size: int, patch_size: int, downsample_ratio: float) -> None:
    """Raise a ValueError unless a tile of `size` pixels consists of whole image tokens."""
    token_size = patch_size * round(1 / downsample_ratio)  # pixels of the side of an image token
    if size < token_size or size % token_size:
        raise ValueError(
            f"An image size of {size} pixels is invalid: expected a multiple of {token_size} (an image token)"
        )


def set_image_size(model, size: int):
    """Adapt the model to tiles of `size` pixels.

    Changes the position embeddings, both configurations and the number of image tokens.
    """
    vision_model = unwrap_peft(model.vision_model)
    patch_size, old_size = vision_model.config.patch_size, vision_model.config.image_size
    check_image_size(size, patch_size, model.downsample_ratio)
    if size != old_size:
        with gathered_parameters(vision_model.embeddings.position_embedding):
            vision_model.resize_pos_embeddings(old_size, size, patch_size)
    model.config.vision_config.image_size = vision_model.config.image_size = size
    model.config.force_image_size = size
    model.num_image_token = count_image_tokens(model.config)
