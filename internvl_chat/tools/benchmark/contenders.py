"""Who is measured by `tools/benchmark_step.py`: our chat model, and transformers' own class with peft, with the same
weights and the same adapters; each takes the same batches and gives a loss."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import InternVLForConditionalGeneration

from internvl.arguments.training import ModelArguments
from internvl.model.adapter_io import PEFT_PREFIX
from internvl.model.hf.adapter import Adapter, to_hf_adapter
from internvl.model.hf.config import to_hf_config
from internvl.model.hf.weights import to_hf
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.varlen_attention import use_varlen_attention
from internvl.train.build_model import set_up_gradient_checkpointing

from .sizes import Size, computing_in, image_token_id, random_model

PARTS = ("vision_model", "language_model")


class Contender(NamedTuple):
    """`build(size, checkpointing, dropout)` gives the model, `loss(model, batch)` its mean loss; how samples are laid:
    into full rows, or into padded batches of samples of similar length or of any."""

    build: Callable[[Size, bool, float], nn.Module]
    loss: Callable[[nn.Module, dict], torch.Tensor]
    packed: bool = False
    by_length: bool = False
    selective: bool = False  # is about which layers compute their activations again


def ours(size: Size, checkpointing: bool, dropout: float, every: float = 1) -> InternVLChatModel:
    """As `train/build.py` makes it for --freeze_{backbone,mlp,llm} True --use_backbone_lora R --use_llm_lora R."""
    model = random_model(size)
    use_varlen_attention(model.language_model, packed=True)
    model = adapted(model, size, dropout)
    set_up_gradient_checkpointing(model, ModelArguments(grad_checkpoint=checkpointing, checkpoint_every=every))
    return model.train()


def adapted(model: InternVLChatModel, size: Size, dropout: float) -> InternVLChatModel:
    """Frozen, with adapters in both towers."""
    torch.manual_seed(1)
    model.requires_grad_(False)
    model.wrap_backbone_lora(size.rank, 2 * size.rank, dropout)
    model.wrap_llm_lora(size.rank, 2 * size.rank, dropout)
    return model


def native(size: Size, checkpointing: bool, dropout: float) -> PeftModel:
    """The same model as transformers' class, and peft's adapters in the same layers with the same numbers.

    Where we have one matrix and transformers several, each of these gets an adapter of that rank of its own.
    """
    source = random_model(size)
    llm_config = source.config.llm_config
    config = to_hf_config(source.config, image_token_id(source.config), tied=False)
    config._attn_implementation = llm_config._attn_implementation or "sdpa"  # flash-attn where we use it
    with computing_in(size.dtype):
        model = InternVLForConditionalGeneration(config)
    model.load_state_dict(dict(to_hf(source.state_dict(), llm_config)))
    model.config.use_cache = model.config.text_config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    source = adapted(source, size, dropout)
    settings, state = to_hf_adapter({part: _adapter(getattr(source, part)) for part in PARTS}, llm_config, config)
    settings.lora_dropout, settings.inference_mode = dropout, False
    model = get_peft_model(model, settings)
    set_peft_model_state_dict(model, state)
    return model.train()


def _adapter(part: PeftModel) -> Adapter:
    tensors = get_peft_model_state_dict(part)
    return part.peft_config[part.active_adapter], {name.removeprefix(PEFT_PREFIX): t for name, t in tensors.items()}


def our_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(**batch).loss


def native_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    known = {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
    return model(**known, pixel_values=batch["pixel_values"] if len(batch["pixel_values"]) else None).loss


CONTENDERS = {
    "ours, packed": Contender(ours, our_loss, packed=True),
    "ours, packed, 4 of 5 layers": Contender(partial(ours, every=1.25), our_loss, packed=True, selective=True),
    "ours, padded by length": Contender(ours, our_loss, by_length=True),
    "transformers + peft, by length": Contender(native, native_loss, by_length=True),
    "transformers + peft, shuffled": Contender(native, native_loss),
}
BASELINE = "transformers + peft, by length"
