"""LoRA adapters of one part of the chat model, by PEFT: which modules are adapted, and how a part is wrapped.

Used by `internvl_chat/adapting.py`; what was trained is saved by `internvl_chat/trained.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from internvl.model.lora_linear import share_inputs, use_lora_linear

# A part that can be adapted, and what the flags call it; the field of the chat config that holds its rank.
PART_FLAGS = {"vision_model": "backbone", "mlp1": "mlp", "language_model": "llm"}
LORA_RANK_FIELDS = {part: f"use_{name}_lora" for part, name in PART_FLAGS.items()}

# What a variant is to PEFT: LoRA; scaled by alpha / sqrt(r) (https://arxiv.org/abs/2312.03732); direction and magnitude
# apart (https://arxiv.org/abs/2402.09353); begun with the largest singular values (https://arxiv.org/abs/2404.02948).
VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}


class LoraTargets(NamedTuple):
    """What is adapted, by suffixes of names: linear layers, and parameters that hold one matrix for each expert."""

    modules: list[str]
    parameters: list[str] = []


VISION_TARGETS = LoraTargets(["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
PROJECTOR_TARGETS = LoraTargets(["1", "3"])

# The layouts most decoders share, by transformers' names.
_ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
_DENSE = LoraTargets(_ATTENTION + [f"mlp.{name}_proj" for name in ("gate", "down", "up")])
# Attention and all experts; the router stays as it is. Each expert's matrix gets adapters of the rank asked for.
_EXPERTS = LoraTargets(_ATTENTION, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])

LLM_TARGETS = {
    "InternLM2ForCausalLM": LoraTargets(["attention.wqkv", "attention.wo", *(f"feed_forward.w{i}" for i in (1, 2, 3))]),
    "Phi3ForCausalLM": LoraTargets(["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"]),
    "LlamaForCausalLM": _DENSE,
    "Qwen2ForCausalLM": _DENSE,
    "Qwen3ForCausalLM": _DENSE,
    "Qwen3MoeForCausalLM": _EXPERTS,
    "GptOssForCausalLM": _EXPERTS,
}
_ROUTERS = {"gate", "router"}


@dataclass(frozen=True)
class LoraSettings:
    """The adapters of one part.

    Args:
        r, alpha: rank and scale: the update is `B A alpha / r`.
        targets: suffixes of the names of adapted layers; default those of the architecture.
        layers: `(start, stop)`, which of the part's layers are adapted, as in a slice; default all.
        variant: one of `VARIANTS`.

    Raises:
        ValueError: a value that cannot be meant.
    """

    r: int
    alpha: float
    dropout: float = 0.05
    targets: Sequence[str] | None = None
    layers: Sequence[int | None] | None = None
    variant: str = "lora"

    def __post_init__(self):
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1 or self.variant not in VARIANTS:
            raise ValueError(
                f"LoRA of rank {self.r}, alpha {self.alpha}, dropout {self.dropout}, variant {self.variant!r} cannot "
                f"be: rank and alpha are positive, dropout is in [0, 1), the variant one of {', '.join(VARIANTS)}"
            )


def llm_targets(llm: nn.Module) -> LoraTargets:
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
    return LoraTargets(sorted(modules - _ROUTERS), sorted(experts))


def _last(name: str, count: int) -> str:
    return ".".join(name.split(".")[-count:])


def is_peft_model(module: nn.Module) -> bool:
    return isinstance(module, PeftModel)


def unwrap_peft(module: nn.Module) -> nn.Module:
    """The model inside a wrap (adapters still in place), or the module itself."""
    return module.get_base_model() if is_peft_model(module) else module


def freeze_all_but_adapters(module: PeftModel):
    """Only the adapters train. `add_adapters` sees to it; loading weights into a wrapped module undoes it."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad = "lora_" in name


def add_adapters(
    module: nn.Module, settings: LoraSettings, targets: LoraTargets, task_type: str | None = None, loaded: bool = True
) -> PeftModel:
    """Puts adapters into `module` and freezes everything else in it. At first they change no number.

    Dropout acts on the input of adapted layers; PEFT has none for adapted parameters (experts).

    Args:
        targets: what is adapted where `settings` does not say so.
        loaded: whether the weights are there: PiSSA begins with their singular values, and takes these out of them.
            Otherwise the weights and adapters to come are of a model that was saved whole, long after its beginning.

    Raises:
        ValueError: the module carries adapters already; settings that do not fit it; a combination with ZeRO-3 or with
            experts that cannot work.
    """
    if is_peft_model(module):
        rank = module.peft_config[module.active_adapter].r
        raise ValueError(f"This part already has LoRA adapters of rank {rank}; merge them before adding others.")
    targets = _chosen(module, settings, targets)
    _refuse_what_cannot_work(settings, targets)
    # PEFT of upstream's pin does not know `target_parameters`, and no architecture there has any.
    more = {"target_parameters": targets.parameters} if targets.parameters else {}
    if settings.variant != "pissa" or loaded:
        more |= VARIANTS[settings.variant]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=0.0 if targets.parameters else settings.dropout,
        target_modules=targets.modules,
        layers_to_transform=_numbers(module, settings.layers) if settings.layers else None,
        task_type=task_type,
        **more,
    )
    use_lora_linear(config)
    wrapped = get_peft_model(module, config)
    share_inputs(wrapped)
    if targets.parameters and settings.dropout:  # in the layers beside them
        for layer in wrapped.modules():
            if isinstance(layer, Linear):
                layer.lora_dropout[wrapped.active_adapter] = nn.Dropout(settings.dropout)
    return wrapped


def _chosen(module: nn.Module, settings: LoraSettings, targets: LoraTargets) -> LoraTargets:
    """The targets that `settings` names, each of which must be there; else `targets`."""
    if settings.targets is None:
        return targets
    linear = [name for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, Conv1D))]
    for target in settings.targets:
        if target not in targets.parameters and not any(f".{name}".endswith(f".{target}") for name in linear):
            known = ", ".join([*targets.modules, *targets.parameters])
            raise ValueError(f"LoRA target {target!r} is the end of no linear layer's name; usual ones are {known}")
    experts = [target for target in settings.targets if target in targets.parameters]
    return LoraTargets([target for target in settings.targets if target not in experts], experts)


def _numbers(module: nn.Module, layers: Sequence[int | None]) -> list[int]:
    """The numbers of the layers that `(start, stop)` means."""
    count = getattr(getattr(module, "config", None), "num_hidden_layers", 0)
    numbers = list(range(count))[slice(*layers)]
    if not numbers:
        raise ValueError(f"LoRA in layers {list(layers)}: this part has {count} layers, none of which is meant")
    return numbers


def _refuse_what_cannot_work(settings: LoraSettings, targets: LoraTargets):
    if targets.parameters and is_deepspeed_zero3_enabled():
        raise ValueError(
            "LoRA on experts does not run under ZeRO-3: PEFT exchanges their weights during forward, and DeepSpeed "
            "loses track of them. Use ZeRO-2, or train without LoRA in the language model."
        )
    if settings.variant == "dora" and is_deepspeed_zero3_enabled():
        raise ValueError(
            "DoRA does not run under ZeRO-3: PEFT computes with adapters' weights outside the layers that DeepSpeed "
            "gathers them for. Use ZeRO-2, or another variant."
        )
    if targets.parameters and (settings.variant in ("dora", "pissa") or settings.layers):
        raise ValueError(
            f"LoRA on experts with variant {settings.variant} and layers {settings.layers}: PEFT adapts experts by "
            "`lora` or `rslora` only, and in all layers."
        )
