"""LoRA adapters of one part of the chat model, by PEFT: which modules are adapted, and how a part is wrapped.

Used by `InternVLChatModel.wrap_backbone_lora` and `wrap_llm_lora`; saving and merging is in `checkpoint`.
"""

from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

VISION_TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]

# The layout most decoders share, by transformers' names.
_SPLIT = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "down", "up")]

LLM_TARGETS = {
    "InternLM2ForCausalLM": ["attention.wqkv", "attention.wo", *(f"feed_forward.w{i}" for i in (1, 2, 3))],
    "Phi3ForCausalLM": ["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"],
    "Qwen2ForCausalLM": _SPLIT,
    "Qwen3ForCausalLM": _SPLIT,
    "LlamaForCausalLM": _SPLIT,
}


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scale (`alpha / r`) and dropout of the adapters of one part."""

    r: int
    alpha: int
    dropout: float = 0.05


def llm_targets(architecture: str) -> list[str] | str:
    """Names (suffixes) of the linear layers adapted in a language model; for an unknown one, all but its head."""
    return LLM_TARGETS.get(architecture, "all-linear")


def is_wrapped(module: nn.Module) -> bool:
    return isinstance(module, PeftModel)


def plain(module: nn.Module) -> nn.Module:
    """The model inside a wrap (adapters still in place), or the module itself."""
    return module.get_base_model() if is_wrapped(module) else module


def freeze_base(module: PeftModel):
    """Only the adapters train. `wrap` sees to it; loading weights into a wrapped module undoes it."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad = "lora_" in name


def wrap(module: nn.Module, settings: LoraSettings, target_modules, task_type: str | None = None) -> PeftModel:
    """Puts adapters into `module` and freezes everything else in it. At first they change no number.

    Raises:
        ValueError: the module carries adapters already.
    """
    if is_wrapped(module):
        rank = module.peft_config[module.active_adapter].r
        raise ValueError(f"This part already has LoRA adapters of rank {rank}; merge them before adding others.")
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_modules,
        task_type=task_type,
    )
    return get_peft_model(module, config)
