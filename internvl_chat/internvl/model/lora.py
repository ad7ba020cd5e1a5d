"""LoRA adapters of one part of the chat model, by PEFT: which modules are adapted, and how a part is wrapped.

Used by `InternVLChatModel.wrap_backbone_lora` and `wrap_llm_lora`; saving and merging is in `checkpoint`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D


class Targets(NamedTuple):
    """What is adapted, by suffixes of names: linear layers, and parameters that hold one matrix for each expert."""

    modules: list[str]
    parameters: list[str] = []


VISION_TARGETS = Targets(["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])

# The layouts most decoders share, by transformers' names.
_ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
_DENSE = Targets(_ATTENTION + [f"mlp.{name}_proj" for name in ("gate", "down", "up")])
# Attention and all experts; the router stays as it is. Each expert's matrix gets adapters of the rank asked for.
_EXPERTS = Targets(_ATTENTION, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])

LLM_TARGETS = {
    "InternLM2ForCausalLM": Targets(["attention.wqkv", "attention.wo", *(f"feed_forward.w{i}" for i in (1, 2, 3))]),
    "Phi3ForCausalLM": Targets(["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"]),
    "LlamaForCausalLM": _DENSE,
    "Qwen2ForCausalLM": _DENSE,
    "Qwen3ForCausalLM": _DENSE,
    "Qwen3MoeForCausalLM": _EXPERTS,
    "GptOssForCausalLM": _EXPERTS,
}
_ROUTERS = {"gate", "router"}


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scale (`alpha / r`) and dropout of the adapters of one part."""

    r: int
    alpha: int
    dropout: float = 0.05


def llm_targets(llm: nn.Module) -> Targets:
    """The row of an architecture; for one without, all linear layers but the head and routers.

    Where experts are parameters of such a model, these and the attention: other layers beside the experts have names
    that PEFT takes for the experts' older ones.
    """
    if row := LLM_TARGETS.get(type(llm).__name__):
        return row
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in llm.named_parameters()}  # also under ZeRO-3
    experts = {_last(name, 3) for name, shape in shapes.items() if ".experts." in name and len(shape) == 3}
    head = llm.get_output_embeddings()
    linear = [n for n, m in llm.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    modules = {_last(name, 1) for name in linear if not experts or "att" in name.split(".")[-2]}
    return Targets(sorted(modules - _ROUTERS), sorted(experts))


def _last(name: str, count: int) -> str:
    return ".".join(name.split(".")[-count:])


def is_wrapped(module: nn.Module) -> bool:
    return isinstance(module, PeftModel)


def plain(module: nn.Module) -> nn.Module:
    """The model inside a wrap (adapters still in place), or the module itself."""
    return module.get_base_model() if is_wrapped(module) else module


def freeze_base(module: PeftModel):
    """Only the adapters train. `wrap` sees to it; loading weights into a wrapped module undoes it."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad = "lora_" in name


def wrap(module: nn.Module, settings: LoraSettings, targets: Targets, task_type: str | None = None) -> PeftModel:
    """Puts adapters into `module` and freezes everything else in it. At first they change no number.

    Dropout acts on the input of adapted layers; PEFT has none for adapted parameters (experts).

    Raises:
        ValueError: the module carries adapters already; or its experts are to be adapted under ZeRO-3.
    """
    if is_wrapped(module):
        rank = module.peft_config[module.active_adapter].r
        raise ValueError(f"This part already has LoRA adapters of rank {rank}; merge them before adding others.")
    if targets.parameters and is_deepspeed_zero3_enabled():
        raise ValueError(
            "LoRA on experts does not run under ZeRO-3: PEFT exchanges their weights during forward, and DeepSpeed "
            "loses track of them. Use ZeRO-2, or train without LoRA in the language model."
        )
    # PEFT of upstream's pin does not know `target_parameters`, and no architecture there has any.
    parameters = {"target_parameters": targets.parameters} if targets.parameters else {}
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=0.0 if parameters else settings.dropout,
        target_modules=targets.modules,
        task_type=task_type,
        **parameters,
    )
    wrapped = get_peft_model(module, config)
    if parameters and settings.dropout:  # in the layers beside them
        for layer in wrapped.modules():
            if isinstance(layer, Linear):
                layer.lora_dropout[wrapped.active_adapter] = nn.Dropout(settings.dropout)
    return wrapped
