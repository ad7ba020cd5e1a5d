"""Keys of a checkpoint's tensors: legacy names, and comparison with the model's."""

import re
from pathlib import Path

from transformers.utils import cached_file

from internvl.model.lora import LLM_TARGETS, LORA_RANK_FIELDS, PROJECTOR_TARGETS, VISION_TARGETS
from internvl.model.safetensors_io import abbreviate_names
from internvl.regular_files import read_safetensors_header

MAX_NAMES = 8  # of each kind in a message


def find_checkpoint_dir(path: str | Path) -> Path:
    """Return a checkpoint's folder, possibly in the hub's local cache."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(str(cached_file(str(path), "config.json", local_files_only=True))).parent
    except OSError as error:
        raise ValueError(f"no checkpoint found at {str(path)!r}") from error


def build_legacy_key_mapping(path: str | Path, config) -> dict[str, str]:
    """Build the `key_mapping` for a checkpoint whose adapters PEFT < 0.6 saved.

    PEFT named the weight of an adapted layer `qkv.weight` then, and `qkv.base_layer.weight` since.

    Returns:
        Regular expression -> replacement; empty for other checkpoints.
    """
    llm_targets = LLM_TARGETS.get(config.llm_config.architectures[0], LLM_TARGETS["LlamaForCausalLM"])
    targets = {"vision_model": VISION_TARGETS, "mlp1": PROJECTOR_TARGETS, "language_model": llm_targets}
    mapping = {}
    for part in (part for part, rank_field in LORA_RANK_FIELDS.items() if getattr(config, rank_field)):
        suffixes = "|".join(map(re.escape, targets[part].modules))
        mapping[rf"^({part}\.base_model\.model\.(?:.*\.)?(?:{suffixes}))\.(?=(?:weight|bias)$)"] = r"\1.base_layer."
    names = list_tensor_names(find_checkpoint_dir(path)) if mapping else ()
    return {pattern: new for pattern, new in mapping.items() if any(re.match(pattern, name) for name in names)}


def list_tensor_names(folder: Path) -> list[str]:
    """List the names of all tensors in a folder's safetensors files."""
    return [name for file in folder.glob("*.safetensors") for name in read_safetensors_header(file)[0]]


def check_checkpoint_keys(name: str, loading_info: dict) -> None:
    """Raise a ValueError that names the wrong keys of checkpoint `name`, in one line.

    Args:
        loading_info: `missing_keys`, `unexpected_keys` and `mismatched_keys` as transformers' `from_pretrained` reports
            them; `not_floating_keys` (key, dtype) and `not_finite_keys`, where a tensor is read here.
    """
    problems = ("missing", "unexpected", "mismatched", "not_floating", "not_finite")
    keys = {problem: set(loading_info.get(f"{problem}_keys") or ()) for problem in problems}
    # A mismatched key comes with the shapes in the checkpoint and in the model.
    keys["mismatched"] = {f"{key} {tuple(got)} for {tuple(expected)}" for key, got, expected in keys["mismatched"]}
    keys["not_floating"] = {f"{key} (expected floating point, got {dtype})" for key, dtype in keys["not_floating"]}
    if any(keys.values()):
        listed = [
            f"{problem.replace('_', ' ')}: {abbreviate_names(keys[problem], MAX_NAMES)}"
            for problem in problems
            if keys[problem]
        ]
        raise ValueError(
            f"The keys of checkpoint {name} do not match the model of its config.json: {'; '.join(listed)}"
        )
