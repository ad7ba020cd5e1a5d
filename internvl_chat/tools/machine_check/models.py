"""Random models with adapters and packed rows for the checks of `tools/gpu_check.py`."""

from collections.abc import Sequence

import numpy as np
import torch

from internvl.data.collators import collate_rows, copy_to_device
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.model.varlen_attention import use_varlen_attention
from internvl.planning.epoch_plan import make_sample_lengths
from internvl.tools.benchmark.samples import make_random_samples
from internvl.tools.benchmark.sizes import ModelSize, build_config, build_random_model, get_image_token_id


def build_adapted_model(size: ModelSize, dropout: float = 0.0) -> InternVLChatModel:
    """Build a random model with LoRA in vision encoder and LLM, for packed rows.

    It is on torch's current device. Only the adapters are trainable. All weights have the data type of the size, as
    DeepSpeed casts them; PEFT alone would make the adapters float32.
    """
    model = build_random_model(size)
    use_varlen_attention(model.language_model, packed=True)
    model.requires_grad_(False)
    model.wrap_backbone_lora(size.rank, 2 * size.rank, dropout)
    model.wrap_llm_lora(size.rank, 2 * size.rank, dropout)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(size.dtype)
    return model.train()


def build_row(size: ModelSize, documents: Sequence[tuple[int, int]], seed: int = 0) -> dict:
    """Build a batch of one packed row; its pixels are rounded to bf16.

    Args:
        documents: (text tokens, tiles) of each. The second half of the text are loss tokens.
    """
    config = build_config(size)
    tile_tokens = count_image_tokens(config)
    lengths = [(text + tile_tokens * tiles, text // 2, tiles) for text, tiles in documents]
    samples = make_random_samples(config, make_sample_lengths(*np.array(lengths).T), torch.bfloat16, seed)
    row = {key: torch.cat([sample[key] for sample in samples]) for key in samples[0]}
    return collate_rows([row], image_token_id=get_image_token_id(config))


def move_batch(batch: dict, device: torch.device, dtype: torch.dtype) -> dict:
    """Move the tensors of a batch to a device, pixels in `dtype`."""
    moved = copy_to_device(batch, device)
    return moved | {"pixel_values": moved["pixel_values"].to(dtype)}
