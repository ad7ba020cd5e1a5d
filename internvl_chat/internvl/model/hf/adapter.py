"""Conversion of LoRA adapters to one PEFT adapter for the HF format.

Serving engines load it beside the base model that `tools/internvl_custom2hf.py` writes. Names and fused matrices follow
`hf/weights.py`: where a weight (out, in) is split by rows, its adapter's B (out, r) is split in the same way, and all
parts share A (r, in).
"""

import math
from collections.abc import Mapping

import torch
from peft import LoraConfig
from transformers import InternVLConfig, InternVLForConditionalGeneration, PretrainedConfig

from internvl.model.hf.weights import convert_weights_to_hf
from internvl.model.lora import PEFT_PREFIX
from internvl.model.safetensors_io import abbreviate_names

# Fields of LoraConfig that serving engines ignore: they read lora_A, lora_B, r and lora_alpha only.
UNSUPPORTED_FIELDS = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "modules_to_save",
    "trainable_token_indices",
    "alpha_pattern",
    "alora_invocation_tokens",
)
# Values of `init_lora_weights` that leave the base weights unchanged; PEFT's other ones (pissa, olora, ...) do not.
INITS_KEEPING_BASE = (True, False, "gaussian", "orthogonal")

PartAdapter = tuple[LoraConfig, Mapping[str, torch.Tensor]]


def convert_adapters_to_hf(
    adapters: Mapping[str, PartAdapter], llm_config: PretrainedConfig, hf_config: InternVLConfig
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Convert the adapters of all parts to one HF adapter.

    It has the largest rank, all others are padded with zeros, and the scale of the first part; a B of another scale is
    multiplied by the ratio. Both leave `scale * B @ A` unchanged.

    Args:
        adapters: part -> settings and tensors, from `adapter_io.read_part_adapter`.
        llm_config: the LLM's configuration in the custom checkpoint.
        hf_config: HF configuration of the same model.

    Raises:
        ValueError: a variant that is more than lora_A and lora_B, or a layer without a counterpart.
    """
    for part, (settings, _) in adapters.items():
        _check_variant(part, settings)
    factors = {part: _pair_factors(tensors) for part, (_, tensors) in adapters.items()}
    rank = max(a.shape[0] for layers in factors.values() for a, _ in layers.values())
    scales = {part: _get_scale(settings) for part, (settings, _) in adapters.items()}
    scale = next(iter(scales.values()))
    state, adapted_layers = {}, set()
    for part, layers in factors.items():
        for layer, (a, b) in layers.items():
            num_missing = rank - a.shape[0]
            for key, hf_b in convert_weights_to_hf({f"{part}.{layer}.weight": b}, llm_config):
                hf_layer = key.removesuffix(".weight")
                adapted_layers.add(hf_layer)
                hf_b = hf_b if scales[part] == scale else hf_b * (scales[part] / scale)
                prefix = f"{PEFT_PREFIX}{hf_layer}"
                # A (r, in) gets more rows, B (out, r) more columns.
                state[f"{prefix}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, num_missing)).clone()
                state[f"{prefix}.lora_B.weight"] = torch.nn.functional.pad(hf_b, (0, num_missing)).contiguous()
    target_names = {layer.rpartition(".")[2] for layer in adapted_layers}
    lora_alpha = scale * rank
    settings = LoraConfig(
        r=rank,
        # pyrefly: ignore[bad-argument-type]  # PEFT declares int, floats work
        lora_alpha=int(lora_alpha) if lora_alpha == int(lora_alpha) else lora_alpha,
        target_modules=sorted(target_names),
        exclude_modules=sorted(_find_linear_layers(hf_config, target_names) - adapted_layers) or None,
        inference_mode=True,
    )
    return settings, state


def _check_variant(part: str, settings: LoraConfig) -> None:
    """Raise a ValueError if the adapter is more than lora_A and lora_B."""
    unsupported = [name for name in UNSUPPORTED_FIELDS if getattr(settings, name, None)]
    if settings.init_lora_weights not in INITS_KEEPING_BASE:
        unsupported.append(f"init_lora_weights {settings.init_lora_weights!r}, which changes the base weights")
    if unsupported:
        raise ValueError(
            f"the adapter of {part} has {', '.join(unsupported)}: serving engines support lora_A and lora_B only; "
            "merge it with tools/merge_lora.py"
        )


def _pair_factors(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return layer -> A (r, in) and B (out, r)."""
    layers = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    if unexpected := set(tensors) - {f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}:
        raise ValueError(
            f"serving engines support lora_A and lora_B of layers only, got {abbreviate_names(unexpected)}"
        )
    return {layer: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for layer in layers}


def _get_scale(settings: LoraConfig) -> float:
    return settings.lora_alpha / (math.sqrt(settings.r) if settings.use_rslora else settings.r)


def _find_linear_layers(hf_config: InternVLConfig, last_names: set[str]) -> set[str]:
    """List the HF model's linear layers with one of these last names."""
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(hf_config)
    linear_layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {name for name in linear_layers if name.rpartition(".")[2] in last_names}
