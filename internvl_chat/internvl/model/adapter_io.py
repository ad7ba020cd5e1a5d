"""Where a LoRA run keeps its adapters on disk, read without building a model.

One folder a part in PEFT's format, beside `config.json` or in `adapters/` there; or, in upstream's checkpoints, among
the weights. Read by `merge` (several runs combined), `tools/export_adapters.py` and `tools/inspect_checkpoint.py`.
"""

from pathlib import Path

import torch
from peft import LoraConfig
from transformers import PretrainedConfig

from internvl.model.internvl_chat.adapter_checkpoint import ADAPTER_FILE
from internvl.model.internvl_chat.lora_mixin import lora_settings_of
from internvl.model.internvl_chat.safe_loading import refuse_pickles
from internvl.model.lora import LLM_TARGETS, LORA_RANK_FIELDS, VARIANTS
from internvl.model.safetensors_io import Checkpoint

PEFT_PREFIX = "base_model.model."  # PEFT's name of the model inside a wrap


def part_folders(folder: str | Path) -> dict[str, Path]:
    """The PEFT folder of each part that has one, whether `folder` is a run's output or its `adapters/`."""
    places = {part: (Path(folder) / part, Path(folder) / "adapters" / part) for part in LORA_RANK_FIELDS}
    found = {part: [p for p in paths if (p / "adapter_config.json").is_file()] for part, paths in places.items()}
    return {part: paths[0] for part, paths in found.items() if paths}


def read_adapters(folder: str | Path, part: str, config: PretrainedConfig) -> tuple[LoraConfig, dict] | None:
    """Settings and tensors of a part's adapter, in PEFT's names without `base_model.model.`; None if it has none.

    Args:
        config: the chat config of `folder`; its rank (and upstream's alpha, twice that) counts where the adapters lie
            among the weights.
    """
    if own := part_folders(folder).get(part):
        tensors = Checkpoint(own)
        return lora_config(own), {name.removeprefix(PEFT_PREFIX): tensors[name] for name in tensors}
    if not (rank := getattr(config, LORA_RANK_FIELDS[part], 0)):
        return None
    tensors, prefix = Checkpoint(folder), f"{part}.{PEFT_PREFIX}"
    found = {name: name.removeprefix(prefix).replace(".default.", ".") for name in tensors if ".lora_" in name}
    found = {name: short for name, short in found.items() if name.startswith(prefix)}
    experts = LLM_TARGETS.get(config.llm_config.architectures[0]) if part == "language_model" else None
    asked = lora_settings_of(config, part)
    settings = LoraConfig(
        r=rank,
        lora_alpha=asked.alpha,
        target_parameters=experts.parameters if experts else None,
        **VARIANTS[asked.variant],
    )
    return settings, {short: tensors[name] for name, short in found.items()}


def lora_config(folder: Path) -> LoraConfig:
    """The settings of a PEFT folder; ValueError if it is of another kind, or its tensors are no safetensors."""
    refuse_pickles(folder)
    if not (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"{folder} has no {ADAPTER_FILE}")
    config = LoraConfig.from_pretrained(folder)
    if type(config) is not LoraConfig or config.megatron_config:  # which would have PEFT import a module by name
        raise ValueError(f"{folder} holds an adapter of type {config.peft_type.value}, not plain LoRA")
    return config


def refuse_adapters(config: PretrainedConfig, path: str | Path) -> None:
    """ValueError if the chat checkpoint `path` is not plain."""
    if not has_plain_weights(config):
        raise ValueError(f"{path} holds LoRA adapters, not plain weights: merge them first with tools/merge_lora.py")


def has_plain_weights(config: PretrainedConfig) -> bool:
    """Whether a chat checkpoint with this config holds all weights itself, and nothing beside them."""
    return not (
        getattr(config, "base_model", None) or any(getattr(config, rank, 0) for rank in LORA_RANK_FIELDS.values())
    )


def refuse_not_finite(tensors: dict[str, torch.Tensor], where: str | Path) -> None:
    """ValueError with the names of the tensors that hold NaN or infinity."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        listed = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        raise ValueError(f"{where} holds NaN or infinite numbers in {len(broken)} tensors: {listed}")
