"""LoRA adapters of one part of the chat model: targets, settings, attachment.

`add_adapters` attaches adapters to a vision encoder, a projector or an LLM by PEFT. `internvl_chat/lora_mixin.py` calls
it for the parts of `InternVLChatModel`, `internvl_chat/adapter_checkpoint.py` saves and loads the result.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard, cast

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from internvl.model.internvl_chat.zero3 import get_full_shape
from internvl.model.lora_linear import register_lora_linear, share_layer_inputs

# Part of the model -> its name in flags, and the field of the chat configuration that holds its LoRA rank.
PART_FLAGS = {"vision_model": "backbone", "mlp1": "mlp", "language_model": "llm"}
LORA_RANK_FIELDS = {part: f"use_{name}_lora" for part, name in PART_FLAGS.items()}
PEFT_PREFIX = "base_model.model."  # PEFT puts it before the names of the wrapped model's parameters

# Variant -> the arguments of `LoraConfig` that select it.
LORA_VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},  # scaled by alpha / sqrt(r), https://arxiv.org/abs/2312.03732
    "dora": {"use_dora": True},  # direction and magnitude apart, https://arxiv.org/abs/2402.09353
    "pissa": {"init_lora_weights": "pissa"},  # initialized by the largest singular values, arXiv 2404.02948
}


class LoraTargets(NamedTuple):
    """Suffixes of the names of adapted linear layers and adapted parameters."""

    modules: list[str]
    parameters: list[str] = []  # of shape (experts, ...): one matrix for each expert


VISION_TARGETS = LoraTargets(["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
PROJECTOR_TARGETS = LoraTargets(["1", "3"])

# The layouts of most LLMs in transformers.
_ATTENTION_MODULES = [f"self_attn.{name}_proj" for name in "qkvo"]
_DENSE_TARGETS = LoraTargets(_ATTENTION_MODULES + [f"mlp.{name}_proj" for name in ("gate", "down", "up")])
# Attention and all experts, not the router. The matrix of each expert gets adapters of the requested rank.
_MOE_TARGETS = LoraTargets(_ATTENTION_MODULES, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])

# LLM class -> its targets; `find_llm_targets` infers those of other classes.
LLM_TARGETS = {
    "InternLM2ForCausalLM": LoraTargets(["attention.wqkv", "attention.wo", *(f"feed_forward.w{i}" for i in (1, 2, 3))]),
    "Phi3ForCausalLM": LoraTargets(["mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"]),
    "LlamaForCausalLM": _DENSE_TARGETS,
    "Qwen2ForCausalLM": _DENSE_TARGETS,
    "Qwen3ForCausalLM": _DENSE_TARGETS,
    "Qwen3MoeForCausalLM": _MOE_TARGETS,
    "GptOssForCausalLM": _MOE_TARGETS,
}
_ROUTER_NAMES = {"gate", "router"}  # of the modules that assign tokens to experts, or that contain such a layer


@dataclass(frozen=True)
class LoraSettings:
    """Settings of the adapters of one part.

    Args:
        r, alpha: rank and `lora_alpha`; the adapter adds `B A x * alpha / r` (`alpha / sqrt(r)` for `rslora`).
        dropout: probability of dropping an element of the adapter's input.
        targets: suffixes of the names of adapted layers; default: those of the architecture.
        layers: `(start, stop)` of the adapted layers, as in a slice; default: all layers.
        variant: a key of `LORA_VARIANTS`.
        trainable_token_ids: tokens whose rows of the input embeddings and the LM head are trained, too; LLM only.

    Raises:
        ValueError: a setting is out of range.
    """

    r: int
    alpha: float
    dropout: float = 0.05
    targets: Sequence[str] | None = None
    layers: Sequence[int | None] | None = None
    variant: str = "lora"
    trainable_token_ids: Sequence[int] = ()

    def __post_init__(self):
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1 or self.variant not in LORA_VARIANTS:
            raise ValueError(
                f"LoRA of rank {self.r}, alpha {self.alpha}, dropout {self.dropout}, variant {self.variant!r} is "
                f"invalid: expected rank >= 1, alpha > 0, dropout in [0, 1), variant in {', '.join(LORA_VARIANTS)}."
            )


def find_llm_targets(llm: PreTrainedModel) -> LoraTargets:
    """Look up or infer the LoRA targets of an LLM.

    An architecture without an entry in `LLM_TARGETS` gets adapters in all linear layers except the LM head and
    routers. If it stores experts as parameters, only these and its attention layers are targets: PEFT would match the
    names of other layers beside the experts with the experts' former names.
    """
    if targets := LLM_TARGETS.get(type(llm).__name__):
        return targets
    shapes = {name: get_full_shape(parameter) for name, parameter in llm.named_parameters()}
    experts = {_name_suffix(name, 3) for name, shape in shapes.items() if ".experts." in name and len(shape) == 3}
    head = llm.get_output_embeddings()
    linear = [n for n, m in llm.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    linear = [name for name in linear if _ROUTER_NAMES.isdisjoint(name.split("."))]
    modules = {_name_suffix(name, 1) for name in linear if not experts or "att" in name.split(".")[-2]}
    return LoraTargets(sorted(modules), sorted(experts))


def _name_suffix(name: str, num_components: int) -> str:
    return ".".join(name.split(".")[-num_components:])


def is_peft_model(module: nn.Module) -> TypeGuard[PeftModel]:
    return isinstance(module, PeftModel)


def unwrap_peft(module: nn.Module) -> Any:
    """Return the model inside a `PeftModel`, or the module itself.

    Adapters stay attached. The return type is `Any`: each part has its own model class.
    """
    return module.get_base_model() if is_peft_model(module) else module


def is_adapter_parameter(name: str) -> bool:
    """Check whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name or ".trainable_tokens_delta." in name


def freeze_all_but_adapters(module: PeftModel):
    """Make the adapters the only trainable parameters.

    PEFT does so for new adapters, but transformers' `from_pretrained` makes all loaded parameters trainable.
    """
    for name, parameter in module.named_parameters():
        parameter.requires_grad = is_adapter_parameter(name)


@contextmanager
def ignore_peft_deprecations() -> Iterator[None]:
    """Ignore a warning of transformers 5 about PEFT, within a context.

    PEFT 0.21 reads `is_gradient_checkpointing` of the model that it wraps, which transformers 5.23 deprecates.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def add_adapters(
    module: nn.Module,
    settings: LoraSettings,
    default_targets: LoraTargets,
    task_type: str | None = None,
    has_base_weights: bool = True,
) -> PeftModel:
    """Attach LoRA adapters to a module and freeze its other parameters.

    The output of the module does not change until the adapters are trained. Dropout applies to the input of adapted
    layers; PEFT does not support it for adapted parameters (experts).

    Args:
        default_targets: the targets if `settings` has none.
        task_type: of PEFT, `CAUSAL_LM` for an LLM.
        has_base_weights: whether the module has its base weights already. PiSSA initializes adapters from the singular
            values of the base weights and subtracts them from these. With False this is skipped: weights and adapters
            are loaded afterwards, from a checkpoint that was saved after the subtraction.

    Raises:
        ValueError: the module has adapters already; settings do not fit the module, or are not supported with ZeRO-3,
            with experts or with a tied LM head.
    """
    if is_peft_model(module):
        rank = cast(LoraConfig, module.peft_config[module.active_adapter]).r
        raise ValueError(f"This part already has LoRA adapters of rank {rank}; merge them before adding others.")
    targets = _select_targets(module, settings, default_targets)
    _check_supported(settings, targets)
    _refuse_tied_head(module, targets)
    # PEFT 0.10, which upstream pins, does not know `target_parameters`; no architecture needs it there.
    options: dict[str, Any] = {"target_parameters": targets.parameters} if targets.parameters else {}
    if settings.trainable_token_ids:
        options["trainable_token_indices"] = _list_trainable_rows(module, settings.trainable_token_ids, targets)
    if settings.variant != "pissa" or has_base_weights:
        options |= LORA_VARIANTS[settings.variant]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # pyrefly: ignore[bad-argument-type]  # PEFT declares int, floats work
        lora_dropout=0.0 if targets.parameters else settings.dropout,
        target_modules=targets.modules,
        layers_to_transform=_select_layers(module, settings.layers) if settings.layers else None,
        task_type=task_type,
        **options,
    )
    register_lora_linear(config)
    with ignore_peft_deprecations():
        peft_model = get_peft_model(module, config)
    share_layer_inputs(peft_model)
    if targets.parameters and settings.dropout:
        # PEFT 0.21 refuses `lora_dropout` together with `target_parameters`. The adapted linear layers support it.
        for layer in peft_model.modules():
            if isinstance(layer, Linear):
                layer.lora_dropout[peft_model.active_adapter] = nn.Dropout(settings.dropout)
    return peft_model


def _select_targets(module: nn.Module, settings: LoraSettings, default_targets: LoraTargets) -> LoraTargets:
    """Return the targets of `settings`, after checking them, or the default."""
    if settings.targets is None:
        return default_targets
    linear = [name for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, Conv1D))]
    for target in settings.targets:
        if target not in default_targets.parameters and not any(f".{name}".endswith(f".{target}") for name in linear):
            known = ", ".join([*default_targets.modules, *default_targets.parameters])
            raise ValueError(f"LoRA target {target!r} matches no linear layer; the default targets are {known}.")
    experts = [target for target in settings.targets if target in default_targets.parameters]
    return LoraTargets([target for target in settings.targets if target not in experts], experts)


def _refuse_tied_head(module: nn.Module, targets: LoraTargets):
    """Raise a ValueError if a target shares its weight with the input embeddings."""
    if not isinstance(module, PreTrainedModel):
        return
    head, embeddings = module.get_output_embeddings(), module.get_input_embeddings()
    for name, layer in module.named_modules():
        is_tied = layer is head and layer.weight is embeddings.weight
        if is_tied and any(f".{name}".endswith(f".{target}") for target in targets.modules):
            raise ValueError(
                f"LoRA target {name!r} is not supported: this LLM ties its LM head to its input embeddings, so "
                "merging the adapter would change both. Remove the target."
            )


def _list_trainable_rows(llm: nn.Module, token_ids: Sequence[int], targets: LoraTargets) -> dict[str, list[int]]:
    """Return the layers whose rows of these tokens are trained, for PEFT.

    They are the input embeddings and the LM head, unless this has an adapter, which trains the rows of all tokens.
    """
    assert isinstance(llm, PreTrainedModel)
    layers = [llm.get_input_embeddings(), llm.get_output_embeddings()]
    names = [name for name, layer in llm.named_modules() if any(layer is wanted for wanted in layers)]
    is_adapted = {name: any(f".{name}".endswith(f".{target}") for target in targets.modules) for name in names}
    return {name: list(token_ids) for name in names if not is_adapted[name]}


def _select_layers(module: nn.Module, layers: Sequence[int | None]) -> list[int]:
    """Return the indices of the layers in the slice `(start, stop)`."""
    num_layers = getattr(getattr(module, "config", None), "num_hidden_layers", 0)
    indices = list(range(num_layers))[slice(*layers)]
    if not indices:
        raise ValueError(f"LoRA in layers {list(layers)} is invalid: this part has {num_layers} layers.")
    return indices


def _check_supported(settings: LoraSettings, targets: LoraTargets):
    """Raise a ValueError for combinations that PEFT or DeepSpeed do not support."""
    if targets.parameters and is_deepspeed_zero3_enabled():
        raise ValueError(
            "LoRA on experts is not supported under ZeRO-3: PEFT exchanges their weights during forward, and DeepSpeed "
            "loses track of them. Use ZeRO-2, or train without LoRA in the LLM."
        )
    if settings.variant == "dora" and is_deepspeed_zero3_enabled():
        raise ValueError(
            "DoRA is not supported under ZeRO-3: PEFT uses the adapters' weights outside the layers that DeepSpeed "
            "gathers them for. Use ZeRO-2, or another variant."
        )
    if settings.trainable_token_ids and is_deepspeed_zero3_enabled():
        raise ValueError(
            "--train_new_tokens True is not supported under ZeRO-3: PEFT uses the embeddings outside the layers that "
            "DeepSpeed gathers them for. Use ZeRO-2."
        )
    if targets.parameters and (settings.variant in ("dora", "pissa") or settings.layers):
        raise ValueError(
            f"LoRA on experts with variant {settings.variant} and layers {settings.layers} is not supported: PEFT "
            "adapts experts by `lora` or `rslora` only, and in all layers."
        )
