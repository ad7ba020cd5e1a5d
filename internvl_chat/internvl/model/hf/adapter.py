"""Conversion of LoRA adapters to one PEFT adapter for the HF format.

PEFT and serving engines load it beside the base model that `tools/internvl_custom2hf.py` writes. Names and fused
matrices follow `hf/weights.py`.
"""

from collections.abc import Mapping

import torch
from peft import LoraConfig
from transformers import InternVLConfig, InternVLForConditionalGeneration, PretrainedConfig

from internvl.model.hf.weights import convert_weights_to_hf
from internvl.model.united_adapter import PartAdapter, list_linear_layers, unite_adapters


def convert_adapters_to_hf(
    adapters: Mapping[str, PartAdapter], llm_config: PretrainedConfig, hf_config: InternVLConfig
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Convert the adapters of all parts to one HF adapter.

    Args:
        adapters: part -> settings and tensors, from `adapter_io.read_part_adapter`.
        llm_config: the LLM's configuration in the custom checkpoint.
        hf_config: HF configuration of the same model.

    Raises:
        ValueError: as `unite_adapters`.
    """

    def find_linear_layers(last_names: set[str]) -> set[str]:
        with torch.device("meta"):
            return list_linear_layers(InternVLForConditionalGeneration(hf_config), last_names)

    return unite_adapters(adapters, lambda weights: convert_weights_to_hf(weights, llm_config), find_linear_layers)
