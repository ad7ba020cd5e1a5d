"""Conversion of LoRA adapters to one PEFT adapter for the chat layout.

vLLM loads it beside a base model in the layout of `InternVLChatModel`, where it adapts the vision encoder as well as
the LLM. Names and rows are those of the checkpoint, for all LLMs. That includes InternLM2's `wqkv`, whose rows are
grouped by key/value head: vLLM 0.32 slices the weight and B by the same ranges of rows, and regroups their output.
"""

from collections.abc import Mapping

import torch
from peft import LoraConfig

from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.united_adapter import PartAdapter, list_linear_layers, unite_adapters

# What vLLM 0.32 accepts; tests/serving/ holds it.
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
VLLM_HEAD_CLASSES = ("LlamaForCausalLM", "Phi3ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def convert_adapters_to_chat(
    adapters: Mapping[str, PartAdapter], config: InternVLChatConfig
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Unite the adapters of all parts, for vLLM's `InternVLChatModel`.

    Args:
        adapters: part -> settings and tensors, from `adapter_io.read_part_adapter`.
        config: of the model without adapters.

    Raises:
        ValueError: as `unite_adapters`, or vLLM has no place for an adapter.
    """
    if "mlp1" in adapters:
        raise ValueError(
            "vLLM does not adapt the projector: leave mlp1 out of --parts and pass --write_base DIR, which merges the "
            "projector's adapters into the base model"
        )
    if config.select_layer != -1:  # vLLM refuses the weights of later layers, and ignores it in the HF layout
        raise ValueError(f"vLLM serves only models with select_layer -1, got {config.select_layer}")

    def find_linear_layers(last_names: set[str]) -> set[str]:
        with torch.device("meta"):
            return list_linear_layers(InternVLChatModel(config), last_names)

    settings, tensors = unite_adapters(adapters, lambda weights: weights.items(), find_linear_layers)
    llm_class = config.llm_config.architectures[0]
    heads = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors} & {"lm_head", "output"}
    if heads and llm_class not in VLLM_HEAD_CLASSES:
        raise ValueError(f"vLLM does not adapt the LM head ({heads.pop()}) of {llm_class}: merge with `internvl merge`")
    if settings.r > VLLM_LORA_RANKS[-1]:
        raise ValueError(
            f"vLLM supports LoRA ranks up to {VLLM_LORA_RANKS[-1]}, got {settings.r}: merge with `internvl merge`"
        )
    return settings, tensors
