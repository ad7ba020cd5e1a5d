"""Adapters of several runs combined with weights, and merged models written: what `tools/merge_lora.py` does beyond
`merge_adapters`.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel

from internvl.model.adapter_io import has_plain_weights, lora_config, part_folders
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    TRAINED_TENSORS_FILE,
    fingerprint_weights,
    is_adapter_checkpoint,
)
from internvl.model.internvl_chat.merge import adapter_parameters, lora_layers
from internvl.model.lora import LORA_RANK_FIELDS, is_peft_model
from internvl.model.tokenizers.loading import load_tokenizer

# PEFT's ways of combining adapters, by its names. The first two are those of the sum of the updates: `cat` is exactly
# it, `svd` its best approximation of the largest rank.
COMBINATIONS = ("cat", "svd", "linear", "ties", "dare_linear")
COMBINED = "combined"
# What stock loaders read beside weights, config.json and tokenizer.
COPIED_FILES = ("generation_config.json", "preprocessor_config.json", "chat_template.jinja", "*.py")


def combine_adapters(
    model: InternVLChatModel,
    others: Sequence[tuple[str | Path, float]],
    own_weight: float = 1.0,
    method: str = "cat",
    density: float = 0.5,
):
    """Makes the weighted combination of the model's own adapters and those in the folders `others` the active adapter.

    Args:
        others: folders of LoRA runs (or their `adapters/`) and weights. A model without adapters has only these.
        method: one of `COMBINATIONS`.
        density: share of each update that `ties` and `dare_linear` keep.

    Raises:
        ValueError: a folder without adapters, or with adapters of another model; a method that cannot combine these.
    """
    for folder, _ in others:
        _refuse_another_base(model, Path(folder))
    found = [(part_folders(folder), weight) for folder, weight in others]
    if empty := [str(folder) for (folder, _), (parts, _) in zip(others, found, strict=True) if not parts]:
        raise ValueError(f"no adapters in {', '.join(empty)}: no vision_model, mlp1 or language_model folder of PEFT's")
    for part in LORA_RANK_FIELDS:
        module = getattr(model, part)
        weights = {module.active_adapter: own_weight} if is_peft_model(module) else {}
        for number, (parts, weight) in enumerate(found):
            if part in parts:
                module = _load(module, parts[part], f"other{number}")
                weights[f"other{number}"] = weight
        if weights:
            setattr(model, part, _combine(module, weights, method, density))


def _refuse_another_base(model: InternVLChatModel, folder: Path):
    """Where both tell what they stand on, it must be the same; and nothing but adapters can be combined."""
    if (folder / TRAINED_TENSORS_FILE).is_file():
        raise ValueError(
            f"{folder} holds other trained tensors beside adapters ({TRAINED_TENSORS_FILE}), which cannot be combined"
        )
    if not is_adapter_checkpoint(folder) or not (model.base_checkpoint or has_plain_weights(model.config)):
        return
    theirs = InternVLChatConfig.from_pretrained(folder).base_model["fingerprint"]
    ours = model.base_checkpoint["fingerprint"] if model.base_checkpoint else fingerprint_weights(model.name_or_path)
    if ours != theirs:
        raise ValueError(
            f"{folder} was trained on another base: its tensors have the fingerprint {theirs[:12]}..., not "
            f"{ours[:12]}..."
        )


def _load(module: torch.nn.Module, folder: Path, name: str) -> PeftModel:
    config = lora_config(folder)
    wrapped = module if is_peft_model(module) else PeftModel(module, config, name)
    result = wrapped.load_adapter(folder, name)
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if missing or result.unexpected_keys:
        strange = ", ".join([*missing, *result.unexpected_keys][:5])
        raise ValueError(f"the adapters in {folder} are not this model's: missing or unexpected {strange}")
    return wrapped


def _combine(module: PeftModel, weights: dict[str, float], method: str, density: float) -> PeftModel:
    configs = [module.peft_config[name] for name in weights]
    if any(config.use_dora or config.init_lora_weights == "pissa" for config in configs):
        raise ValueError("DoRA and PiSSA adapters cannot be combined: they are not sums with the base; merge each run")
    if any(config.target_parameters for config in configs):
        raise ValueError(
            "PEFT does not combine adapters on experts: merge one run at a time, without --adapter, --weight"
        )
    for parameter in adapter_parameters(module):
        parameter.data = parameter.data.float()
    density = density if method in ("ties", "dare_linear") else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dare_linear draws what it drops
        module.add_weighted_adapter(
            list(weights), list(weights.values()), COMBINED, method, svd_full_matrices=False, density=density
        )
    for layer in lora_layers(module):
        if COMBINED in layer.scaling:
            layer.scaling[COMBINED] = 1.0  # it is in the combined matrices; PEFT forgets that under rsLoRA
    module.set_adapter(COMBINED)
    return module


def save_merged(model: InternVLChatModel, source: str | Path, folder: str | Path):
    """Writes a merged model with all that lies beside the weights in `source`, the checkpoint it was made of."""
    model.config.merged_from = str(source)
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    for file in (file for pattern in COPIED_FILES for file in Path(source).glob(pattern)):
        shutil.copyfile(file, Path(folder) / file.name)
