"""Reading the LoRA adapters of a checkpoint from its files.

Each adapted part has a folder in PEFT's format, beside `config.json` or in `adapters/`. In upstream's checkpoints the
adapters are among the weights instead. No function here builds a model.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from transformers import PretrainedConfig

from internvl.model.internvl_chat.adapter_checkpoint import ADAPTER_FILE
from internvl.model.internvl_chat.config_values import MAX_LORA_RANK
from internvl.model.internvl_chat.lora_mixin import get_lora_settings
from internvl.model.internvl_chat.safe_loading import (
    ADAPTER_CONFIG_FILE,
    one_line_checkpoint_errors,
    refuse_pickles,
    refuse_unsafe_configs,
)
from internvl.model.lora import LLM_TARGETS, LORA_RANK_FIELDS, LORA_VARIANTS, PEFT_PREFIX, is_adapter_parameter
from internvl.model.safetensors_io import CheckpointTensors, abbreviate_names
from internvl.model.slow_patterns import is_slow_pattern
from internvl.regular_files import read_json_object

NAME_PATTERN_FIELDS = ("target_modules", "exclude_modules", "layers_pattern")  # regular expressions, if not lists
MAX_NAME_QUANTIFIERS = 4  # of a regular expression that is matched with thousands of names
PATTERN_FIELDS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}  # exceptions by the name of the layer
UNSUPPORTED_LORA_FIELDS = (
    *("megatron_config", "loftq_config", "eva_config", "corda_config", "arrow_config", "layer_replication"),
    *("lora_ga_config", "alora_invocation_tokens"),
)


def find_adapter_dirs(folder: str | Path) -> dict[str, Path]:
    """Return the PEFT folder of each adapted part.

    Args:
        folder: a checkpoint, or the `adapters/` in one.
    """
    candidates = {part: (Path(folder) / part, Path(folder) / "adapters" / part) for part in LORA_RANK_FIELDS}
    existing = {part: [p for p in paths if (p / ADAPTER_CONFIG_FILE).is_file()] for part, paths in candidates.items()}
    return {part: paths[0] for part, paths in existing.items() if paths}


def read_part_adapter(
    folder: str | Path, part: str, config: PretrainedConfig
) -> tuple[LoraConfig, dict[str, torch.Tensor]] | None:
    """Read settings and tensors of one part's adapter.

    Returns None if the part has no adapter. Names are PEFT's without `base_model.model.`.

    Args:
        config: the chat configuration of `folder`. If the adapters are among the weights, it has their rank and alpha
            (upstream's checkpoints have no alpha: it is twice the rank).
    """
    if adapter_dir := find_adapter_dirs(folder).get(part):
        tensors = CheckpointTensors(adapter_dir)
        return load_lora_config(adapter_dir), {name.removeprefix(PEFT_PREFIX): tensors[name] for name in tensors}
    if not (rank := getattr(config, LORA_RANK_FIELDS[part], 0)):
        return None
    tensors, prefix = CheckpointTensors(folder), f"{part}.{PEFT_PREFIX}"
    lora_names = [name for name in tensors if name.startswith(prefix) and is_adapter_parameter(name)]
    targets = LLM_TARGETS.get(config.llm_config.architectures[0]) if part == "language_model" else None
    settings = get_lora_settings(config, part)
    lora_config = LoraConfig(
        r=rank,
        lora_alpha=settings.alpha,  # pyrefly: ignore[bad-argument-type]  # PEFT declares int, floats work
        target_parameters=targets.parameters if targets else None,
        **LORA_VARIANTS[settings.variant],
    )
    # The state dict of a `PeftModel` has the adapter's name ("default") in its keys; PEFT's own files do not.
    return lora_config, {name.removeprefix(prefix).replace(".default.", "."): tensors[name] for name in lora_names}


def load_lora_config(folder: Path) -> LoraConfig:
    """Load the LoRA configuration of a PEFT folder.

    Raises:
        ValueError: the adapter is of another type, a value is invalid, or its tensors are not safetensors.
    """
    refuse_pickles(folder)
    if not (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"{folder} has no {ADAPTER_FILE}")
    read_adapter_config(folder)
    with one_line_checkpoint_errors(f"{folder / ADAPTER_CONFIG_FILE}"):
        return cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))


def read_adapter_config(folder: Path) -> dict:
    """Read and check the JSON of a PEFT folder, which is untrusted.

    Raises:
        ValueError: the adapter is of another type than LoRA, or a value is invalid.
    """
    refuse_unsafe_configs(folder)
    file = folder / ADAPTER_CONFIG_FILE
    config = read_json_object(file)
    # With the other keys, PEFT imports a module by name, reads further files or quantizes the model.
    unsupported = [key for key in UNSUPPORTED_LORA_FIELDS if config.get(key)]
    if (kind := config.get("peft_type")) != "LORA" or unsupported:
        reason = f"{unsupported[0]} is set" if unsupported else f"its type is {kind!r:.80}"
        raise ValueError(f"{folder} holds an unsupported adapter ({reason}): only plain LoRA is supported.")
    ranks, alphas = ([config.get(key), *_get_values(config, pattern, file)] for key, pattern in PATTERN_FIELDS.items())
    if not all(type(rank) is int and 1 <= rank <= MAX_LORA_RANK for rank in ranks):
        raise ValueError(f"{file} is invalid: r and rank_pattern must be integers from 1 to {MAX_LORA_RANK:,}.")
    patterns = [config.get(key) for key in NAME_PATTERN_FIELDS]
    patterns += [pattern for key in PATTERN_FIELDS.values() for pattern in config.get(key) or {}]
    if slow := [text for text in patterns if isinstance(text, str) and is_slow_pattern(text, MAX_NAME_QUANTIFIERS)]:
        raise ValueError(f"{file}: the pattern {slow[0]!r:.80} is not supported: matching it may take very long.")
    numbers: list[Any] = [*alphas, config.get("lora_dropout", 0)]
    if not all(type(number) in (int, float) and abs(number) < 1e6 for number in numbers):
        raise ValueError(f"{file} is invalid: lora_alpha, alpha_pattern and lora_dropout must be finite numbers.")
    return config


def _get_values(config: dict, key: str, file: Path) -> Iterable:
    if not isinstance(values := config.get(key) or {}, dict):
        raise ValueError(f"{file} is invalid: {key} is {values!r:.80}, expected a JSON object.")
    return values.values()


def has_adapters(config: PretrainedConfig) -> bool:
    """Check whether a chat checkpoint with this configuration holds adapters.

    That includes adapter checkpoints, whose weights are in a base checkpoint.
    """
    ranks = [getattr(config, field, 0) for field in LORA_RANK_FIELDS.values()]
    return bool(getattr(config, "base_model", None) or any(ranks))


def require_no_adapters(config: PretrainedConfig, path: str | Path) -> None:
    """Raise a ValueError if the chat checkpoint `path` holds adapters."""
    if has_adapters(config):
        raise ValueError(f"{path} holds LoRA adapters, not plain weights: merge them first with `internvl merge`")


def require_finite(tensors: dict[str, torch.Tensor], source: str | Path) -> None:
    """Raise a ValueError with the names of non-finite tensors."""
    non_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if non_finite:
        raise ValueError(
            f"{source}: non-finite values (NaN or infinity) in {len(non_finite)} tensors: "
            f"{abbreviate_names(non_finite)}"
        )
