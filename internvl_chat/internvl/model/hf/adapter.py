"""LoRA adapters of a chat model as one PEFT adapter for transformers' own InternVL class, which serving engines read.

The names and the fused matrices are those of `hf_format`: where a matrix is split into several by its rows, they share
the A of its adapter, and B is split as the matrix is.
"""

import math
from collections.abc import Mapping

import torch
from peft import LoraConfig
from transformers import InternVLConfig, InternVLForConditionalGeneration, PretrainedConfig

from internvl.model.adapter_io import PEFT_PREFIX
from internvl.model.hf.weights import to_hf

# What an engine that reads lora_A, lora_B, r and lora_alpha would not do, by the field of PEFT's that asks for it.
REFUSED = ("use_dora", "lora_bias", "target_parameters", "modules_to_save", "alpha_pattern", "alora_invocation_tokens")
KEEP_THE_BASE = (True, False, "gaussian", "orthogonal")  # values of init_lora_weights; the others change the base

Adapter = tuple[LoraConfig, Mapping[str, torch.Tensor]]


def to_hf_adapter(
    adapters: Mapping[str, Adapter], llm_config: PretrainedConfig, hf_config: InternVLConfig
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Settings and tensors of the same adapters on transformers' class.

    Parts of different ranks and scales become one adapter of the largest rank: rows and columns of zeros are added, and
    B carries what a part's scale is above the first one's. Both leave the products as they are.

    Args:
        adapters: part -> settings and tensors, as `adapter_files.read_adapters` gives them.
        llm_config: the chat model's language model; hf_config: transformers' configuration of the same model.

    Raises:
        ValueError: a variant that is more than lora_A and lora_B, or a layer that has no counterpart.
    """
    for part, (settings, _) in adapters.items():
        _refuse_variants(part, settings)
    pairs = {part: _pairs(tensors) for part, (_, tensors) in adapters.items()}
    rank = max(a.shape[0] for found in pairs.values() for a, _ in found.values())
    scales = {part: _scale(settings) for part, (settings, _) in adapters.items()}
    scale = next(iter(scales.values()))
    state, modules = {}, set()
    for part, found in pairs.items():
        for layer, (a, b) in found.items():
            for name, rows in to_hf({f"{part}.{layer}.weight": b}, llm_config):
                module = name.removesuffix(".weight")
                modules.add(module)
                missing = rank - a.shape[0]
                state[f"{PEFT_PREFIX}{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).clone()
                rows = rows if scales[part] == scale else rows * (scales[part] / scale)
                state[f"{PEFT_PREFIX}{module}.lora_B.weight"] = torch.nn.functional.pad(rows, (0, missing)).contiguous()
    targets = {module.rpartition(".")[2] for module in modules}
    settings = LoraConfig(
        r=rank,
        lora_alpha=_whole(scale * rank),
        target_modules=sorted(targets),
        exclude_modules=sorted(_others(hf_config, targets) - modules) or None,
        inference_mode=True,
    )
    return settings, state


def _refuse_variants(part: str, settings: LoraConfig):
    asked = [name for name in REFUSED if getattr(settings, name, None)]
    if settings.init_lora_weights not in KEEP_THE_BASE:
        asked.append(f"init_lora_weights {settings.init_lora_weights!r}, which changes the base")
    if asked:
        raise ValueError(
            f"the adapter of {part} has {', '.join(asked)}: serving engines take plain lora_A and lora_B only; "
            "merge it with tools/merge_lora.py"
        )


def _pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> A (r, in) and B (out, r)."""
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    if strange := set(tensors) - {f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}:
        raise ValueError(f"serving engines take lora_A and lora_B of layers only, not {', '.join(sorted(strange)[:5])}")
    return {layer: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for layer in layers}


def _scale(settings: LoraConfig) -> float:
    return settings.lora_alpha / (math.sqrt(settings.r) if settings.use_rslora else settings.r)


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _others(hf_config: InternVLConfig, targets: set[str]) -> set[str]:
    """All linear layers of transformers' model whose last name is one of `targets`."""
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(hf_config)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {name for name in linear if name.rpartition(".")[2] in targets}
