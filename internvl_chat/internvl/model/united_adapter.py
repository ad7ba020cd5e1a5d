"""One PEFT adapter for the whole model, from the adapters of its parts.

PEFT and serving engines load one folder with one rank and one scale. `hf/adapter.py` and `chat_adapter.py` give it the
names of two layouts.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from peft import LoraConfig

from internvl.model.lora import PEFT_PREFIX
from internvl.model.safetensors_io import abbreviate_names

# Fields of LoraConfig that serving engines refuse or ignore: they read lora_A, lora_B, r and lora_alpha only.
UNSUPPORTED_FIELDS = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "alpha_pattern",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Values of `init_lora_weights` that leave the base weights unchanged; PEFT's other ones (pissa, olora, ...) do not.
INITS_KEEPING_BASE = (True, False, "gaussian", "orthogonal")

PartAdapter = tuple[LoraConfig, Mapping[str, torch.Tensor]]
# Layers of the custom layout -> their B matrices; yields the names in another layout and their rows.
ConvertFn = Callable[[Mapping[str, torch.Tensor]], Iterable[tuple[str, torch.Tensor]]]


def unite_adapters(
    adapters: Mapping[str, PartAdapter], convert_fn: ConvertFn, find_linear_layers: Callable[[set[str]], set[str]]
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Unite the adapters of all parts in one adapter.

    It has the largest rank, all others are padded with zeros, and the scale of the first layer; a B of another scale is
    multiplied by the ratio. Both leave `scale * B @ A` unchanged.

    Args:
        adapters: part -> settings and tensors, from `adapter_io.read_part_adapter`.
        convert_fn: converts weights `PART.LAYER.weight`, here the matrices B (out, r), to the names of a layout. Where
            it splits a weight by rows, all parts share A (r, in).
        find_linear_layers: last names -> all linear layers of the layout's model with one of these last names.

    Raises:
        ValueError: a variant that is more than lora_A and lora_B, or a layer without a counterpart.
    """
    for part, (settings, _) in adapters.items():
        _check_variant(part, settings)
    layers = [
        (f"{part}.{layer}.weight", a, b, _get_scale(settings, len(a)))
        for part, (settings, tensors) in adapters.items()
        for layer, (a, b) in _pair_factors(tensors).items()
    ]
    rank, scale = max(len(a) for _, a, _, _ in layers), layers[0][3]
    state, adapted_layers = {}, set()
    for name, a, b, layer_scale in layers:
        num_missing = rank - len(a)
        for key, rows in convert_fn({name: b}):
            layer = key.removesuffix(".weight")
            adapted_layers.add(layer)
            rows = rows if layer_scale == scale else rows * (layer_scale / scale)
            # A (r, in) gets more rows, B (out, r) more columns.
            state[f"{PEFT_PREFIX}{layer}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, num_missing)).clone()
            state[f"{PEFT_PREFIX}{layer}.lora_B.weight"] = torch.nn.functional.pad(rows, (0, num_missing)).contiguous()
    target_names = {layer.rpartition(".")[2] for layer in adapted_layers}
    lora_alpha = scale * rank
    settings = LoraConfig(
        r=rank,
        # pyrefly: ignore[bad-argument-type]  # PEFT declares int, floats work
        lora_alpha=int(lora_alpha) if lora_alpha == int(lora_alpha) else lora_alpha,
        target_modules=sorted(target_names),
        exclude_modules=sorted(find_linear_layers(target_names) - adapted_layers) or None,
        inference_mode=True,
    )
    return settings, state


def list_linear_layers(model: torch.nn.Module, last_names: set[str]) -> set[str]:
    """List a model's linear layers with one of these last names."""
    linear_layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {name for name in linear_layers if name.rpartition(".")[2] in last_names}


def _pair_factors(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return layer -> A (r, in) and B (out, r).

    Raises:
        ValueError: there are other tensors than lora_A and lora_B.
    """
    layers = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    if unexpected := set(tensors) - {f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}:
        raise ValueError(
            f"serving engines support lora_A and lora_B of layers only, got {abbreviate_names(unexpected)}"
        )
    return {layer: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for layer in layers}


def _check_variant(part: str, settings: LoraConfig) -> None:
    """Raise a ValueError if the adapter is more than lora_A and lora_B."""
    unsupported = [name for name in UNSUPPORTED_FIELDS if getattr(settings, name, None)]
    if settings.init_lora_weights not in INITS_KEEPING_BASE:
        unsupported.append(f"init_lora_weights {settings.init_lora_weights!r}, which changes the base weights")
    if unsupported:
        raise ValueError(
            f"the adapter of {part} has {', '.join(unsupported)}: serving engines support lora_A and lora_B only; "
            "merge it with `internvl merge`"
        )


def _get_scale(settings: LoraConfig, rank: int) -> float:
    """Return the factor of B @ A; `rank` is that of the layer, which `rank_pattern` may set."""
    return settings.lora_alpha / (math.sqrt(rank) if settings.use_rslora else rank)
