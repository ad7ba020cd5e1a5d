"""Combining the LoRA adapters of several runs, and saving merged models."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel

from internvl.model.adapter_io import find_adapter_dirs, has_adapters, load_lora_config
from internvl.model.auxiliary_files import read_auxiliary_files, write_auxiliary_files
from internvl.model.chat_template import save_tokenizer
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    TRAINED_TENSORS_FILE,
    fingerprint_weights,
    is_adapter_checkpoint,
)
from internvl.model.internvl_chat.merge import find_lora_layers, get_adapter_parameters
from internvl.model.lora import LORA_RANK_FIELDS, ignore_peft_deprecations, is_peft_model
from internvl.model.safetensors_io import abbreviate_names
from internvl.model.tokenizers.loading import load_tokenizer

# Values of PEFT's `combination_type`. With `cat`, the product B A of the combined adapter is the exact weighted sum of
# the products; `svd` is the best approximation of that sum at the largest rank.
COMBINATION_METHODS = ("cat", "svd", "linear", "ties", "dare_linear")
COMBINED_ADAPTER = "combined"


def combine_adapters(
    model: InternVLChatModel,
    others: Sequence[tuple[str | Path, float]],
    own_weight: float = 1.0,
    method: str = "cat",
    density: float = 0.5,
) -> None:
    """Combine the model's adapters with those of other runs.

    The weighted combination becomes the active adapter of each part.

    Args:
        others: checkpoints of LoRA runs (or their `adapters/`), and their weights. `model` may have no adapters itself.
        method: one of `COMBINATION_METHODS`.
        density: fraction of each adapter's values that `ties` and `dare_linear` keep.

    Raises:
        ValueError: a folder without adapters or with another model's; adapters that the method does not support.
    """
    for folder, _ in others:
        _require_same_base(model, Path(folder))
    dirs_and_weights = [(find_adapter_dirs(folder), weight) for folder, weight in others]
    without_adapters = [
        str(folder) for (folder, _), (dirs, _) in zip(others, dirs_and_weights, strict=True) if not dirs
    ]
    if without_adapters:
        raise ValueError(
            f"no adapters in {', '.join(without_adapters)}: expected a PEFT folder {', '.join(LORA_RANK_FIELDS)}"
        )
    for part in LORA_RANK_FIELDS:
        module = getattr(model, part)
        weights = {module.active_adapter: own_weight} if is_peft_model(module) else {}
        for index, (adapter_dirs, weight) in enumerate(dirs_and_weights):
            if part in adapter_dirs:
                name = f"other{index}"
                module = _load_adapter(module, adapter_dirs[part], name)
                weights[name] = weight
        if weights:
            setattr(model, part, _combine_loaded_adapters(module, weights, method, density))


def _require_same_base(model: InternVLChatModel, folder: Path) -> None:
    """Raise a ValueError if `folder` has another base or other trained tensors."""
    if (folder / TRAINED_TENSORS_FILE).is_file():
        raise ValueError(
            f"{folder} holds other trained tensors beside adapters ({TRAINED_TENSORS_FILE}): combining them is not "
            "supported"
        )
    if not is_adapter_checkpoint(folder):
        return  # a PEFT folder or upstream's layout: its base is not recorded
    if model.base_checkpoint:
        expected = model.base_checkpoint["fingerprint"]
    elif has_adapters(model.config):
        return  # upstream's layout: base weights and adapters share a file, which has no fingerprint of the base
    else:
        expected = fingerprint_weights(str(model.name_or_path))
    actual = InternVLChatConfig.from_pretrained(folder).base_model["fingerprint"]
    if actual != expected:
        raise ValueError(
            f"{folder} was trained on another base checkpoint: expected the fingerprint {expected[:12]}..., got "
            f"{actual[:12]}..."
        )


def _load_adapter(module: torch.nn.Module, adapter_dir: Path, name: str) -> PeftModel:
    """Load an adapter under `name`, beside the module's other adapters.

    Raises:
        ValueError: its tensors are not those of the module's layers.
    """
    config = load_lora_config(adapter_dir)
    with ignore_peft_deprecations():
        peft_model = module if is_peft_model(module) else PeftModel(module, config, name)
    result = peft_model.load_adapter(adapter_dir, name)
    # PEFT 0.21 reports the parameters of all other adapters as missing, too.
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if mismatched := [*missing, *result.unexpected_keys]:
        raise ValueError(
            f"the adapters in {adapter_dir} do not fit this model: missing or unexpected {abbreviate_names(mismatched)}"
        )
    return peft_model


def _combine_loaded_adapters(
    module: PeftModel, weights: dict[str, float], method: str, density: float | None
) -> PeftModel:
    """Combine adapters (name -> weight) to one, and activate that.

    Raises:
        ValueError: DoRA, PiSSA or adapters on experts, which are not supported.
    """
    configs = [cast(LoraConfig, module.peft_config[name]) for name in weights]
    if any(config.use_dora or config.init_lora_weights == "pissa" for config in configs):
        raise ValueError(
            "combining DoRA and PiSSA adapters is not supported: they do more than add to the base weights. Merge each "
            "run instead"
        )
    if any(config.trainable_token_indices for config in configs):
        raise ValueError(
            "combining adapters that train the rows of new tokens is not supported: each run has other rows for them. "
            "Merge one run at a time, without --adapter and --weight"
        )
    if any(config.target_parameters for config in configs):
        raise ValueError(
            "combining adapters on experts is not supported by PEFT: merge one run at a time, without --adapter and "
            "--weight"
        )
    for parameter in get_adapter_parameters(module):
        parameter.data = parameter.data.float()  # the combination is computed in float32
    density = density if method in ("ties", "dare_linear") else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dare_linear drops values at random
        module.add_weighted_adapter(
            list(weights), list(weights.values()), COMBINED_ADAPTER, method, svd_full_matrices=False, density=density
        )
    # The combined matrices contain the scales already. PEFT 0.21 keeps `use_rslora` and would scale once more.
    for layer in find_lora_layers(module):
        if COMBINED_ADAPTER in layer.scaling:
            layer.scaling[COMBINED_ADAPTER] = 1.0
    module.set_adapter(COMBINED_ADAPTER)
    return module


def save_merged_checkpoint(
    model: InternVLChatModel, source: str | Path, output_dir: str | Path, with_remote_code: bool = False
) -> None:
    """Save a merged model, with the tokenizer and the other files of `source`.

    Args:
        source: the checkpoint with the adapters; `merged_from` in config.json.
        with_remote_code: see `write_auxiliary_files`.
    """
    model.config.merged_from = str(source)
    model.save_pretrained(output_dir)
    save_tokenizer(load_tokenizer(source), model.config, output_dir)
    write_auxiliary_files(read_auxiliary_files(source), output_dir, "merging adapters", with_remote_code)
