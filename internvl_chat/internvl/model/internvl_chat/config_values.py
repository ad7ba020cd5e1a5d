"""Check the values of a `config.json` before anything is built or allocated from them.

A configuration of unknown origin may have fields of another type, contradictory sizes, or sizes that exhaust the
memory. Each rule is a row in a table. What only the weights can tell, `weight_shapes.py` compares with them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from internvl.command_line import CHAT_MODEL_TYPE
from internvl.model.internvl_chat.safe_loading import MAX_CONFIG_BYTES, iterate_values, refuse_unsafe_values
from internvl.regular_files import read_json_object

VISION_MODEL_TYPE, HF_MODEL_TYPE = "intern_vit_6b", "internvl"
MAX_INT = 2**31 - 1
MAX_LAYERS, MAX_TILE_SIZE, MAX_TILES, MAX_LORA_RANK, MAX_LABELS = 1024, 4096, 1024, 2**16, 2**16
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Rule:
    """What a value must be; `None` is accepted, too, unless the rule is required."""

    is_valid: Callable[[Any], bool]
    expected: str
    required: bool = False


def integer(low: int, high: int = MAX_INT, required: bool = False) -> Rule:
    is_valid = lambda value: type(value) is int and low <= value <= high  # noqa: E731  # a bool is no integer here
    return Rule(is_valid, f"an integer from {low:,} to {high:,}", required)


def number(low: float, high: float, expected: str) -> Rule:
    return Rule(lambda value: type(value) in (int, float) and low <= value < high, expected)


def one_of(*values) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in values, f"one of {', '.join(values)}")


def is_inverse_of_integer(value: Any) -> bool:
    return type(value) in (int, float) and 1 / 64 <= value <= 1 and math.isclose(1 / value, round(1 / value))


def is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 1 <= value <= MAX_INT


PROBABILITY = number(0, 1, "a probability in [0, 1)")
EPSILON = number(0, 0.1, "a number in [0, 0.1)")
BOOLEAN = Rule(lambda value: type(value) is bool, "true or false")
SIZE = integer(1)
# Some LLMs have one size for each layer.
SIZES = Rule(lambda value: all(map(is_size, value if isinstance(value, list) else [value])), SIZE.expected)
OBJECT = Rule(lambda value: isinstance(value, dict), "an object")
NAMES = Rule(lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value), "a list of names")
TEXT = Rule(lambda value: isinstance(value, str), "a text")
IDS_TO_LABELS = Rule(lambda value: isinstance(value, dict) and all(map(str.isdecimal, value)), "an object, id -> label")

# Rules of keys at any depth.
COMMON_RULES = {
    "architectures": NAMES,
    "model_type": Rule(TEXT.is_valid, "a name", required=True),
    "num_labels": integer(0, MAX_LABELS),
    "id2label": IDS_TO_LABELS,
    "label2id": OBJECT,
    "dtype": one_of(*DTYPES),
    "torch_dtype": one_of(*DTYPES),
    "initializer_range": number(0, 1e3, "a number >= 0"),
    "initializer_factor": number(0, 1e3, "a number >= 0"),
}
CHAT_RULES = {
    "downsample_ratio": Rule(is_inverse_of_integer, "1 / n, where an image token covers n x n patches", required=True),
    "force_image_size": integer(1, MAX_TILE_SIZE),
    "select_layer": integer(-MAX_LAYERS - 1, MAX_LAYERS, required=True),
    "ps_version": one_of("v1", "v2"),
    "template": TEXT,
    "system_message": TEXT,
    "min_dynamic_patch": integer(1, MAX_TILES, required=True),
    "max_dynamic_patch": integer(1, MAX_TILES, required=True),
    "use_backbone_lora": integer(0, MAX_LORA_RANK, required=True),
    "use_llm_lora": integer(0, MAX_LORA_RANK, required=True),
    "use_mlp_lora": integer(0, MAX_LORA_RANK, required=True),
    "lora_settings": OBJECT,
    "base_model": OBJECT,
    "pad2square": BOOLEAN,
    "dynamic_image_size": BOOLEAN,
    "use_thumbnail": BOOLEAN,
    "tie_word_embeddings": BOOLEAN,
}
VISION_RULES = {
    "num_channels": integer(1, 16),
    "patch_size": integer(1, MAX_TILE_SIZE),
    "image_size": integer(1, MAX_TILE_SIZE),
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_attention_heads": SIZE,
    "num_hidden_layers": integer(1, MAX_LAYERS),
    "qkv_bias": BOOLEAN,
    "qk_normalization": BOOLEAN,
    "norm_type": one_of("layer_norm", "rms_norm"),
    "hidden_act": one_of(*ACT2FN),
    "layer_norm_eps": EPSILON,
    "initializer_range": COMMON_RULES["initializer_range"],
    "initializer_factor": COMMON_RULES["initializer_factor"],
    "dropout": PROBABILITY,
    "attention_dropout": PROBABILITY,
    "drop_path_rate": PROBABILITY,
}
VISION_RULES = {key: replace(rule, required=True) for key, rule in VISION_RULES.items()}
LLM_RULES = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZES,
    "num_hidden_layers": integer(1, MAX_LAYERS),
    "num_attention_heads": SIZES,
    "num_key_value_heads": SIZES,
    "head_dim": SIZE,
    "max_position_embeddings": SIZE,
    "rms_norm_eps": EPSILON,
    "layer_norm_eps": EPSILON,
    "rope_theta": number(1e-3, 1e12, "a number > 0"),
    "hidden_act": one_of(*ACT2FN),
    "tie_word_embeddings": BOOLEAN,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "pad_token_id": integer(-1),
}
BASE_MODEL_RULES = {
    "path": Rule(TEXT.is_valid, "a path", required=True),
    "fingerprint": Rule(TEXT.is_valid, "a digest", required=True),
    "merged": BOOLEAN,
    "known_tokens": SIZE,
}


def describe_config_file(path: str | Path) -> str:
    """Return the name of a `config.json` for messages, if it is readable.

    Args:
        path: a folder, a file, or ORG/NAME on the hub, of which nothing is read here.

    Raises:
        ValueError, OSError: the folder or the file does not exist, or it is no JSON object.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if Path(path).is_dir() and not file.exists():
        raise ValueError(f"no checkpoint in {str(path)!r}: config.json is missing")
    if not file.exists():
        if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
            raise ValueError(f"the checkpoint folder {str(path)!r} does not exist")
        return f"config.json of {path}"
    read_json_object(file, MAX_CONFIG_BYTES)
    return str(file)


def check_chat_config(fields: Mapping, source: str | Path) -> None:
    """Raise a ValueError unless these can be the fields of a chat model.

    Args:
        fields: the content of its `config.json`.
        source: the file or repository, for messages.
    """
    model_type = fields.get("model_type", CHAT_MODEL_TYPE)
    if model_type == HF_MODEL_TYPE:
        raise ValueError(
            f"{source} is in transformers' own layout (model_type {HF_MODEL_TYPE!r}), which is not loaded directly: "
            "convert the folder with tools/internvl_hf2custom.py."
        )
    if model_type != CHAT_MODEL_TYPE:
        raise ValueError(f"{source} has model_type {model_type!r:.80}, expected {CHAT_MODEL_TYPE!r}: another model.")
    if missing := [part for part in ("vision_config", "llm_config") if not isinstance(fields.get(part), dict)]:
        raise ValueError(
            f"{source} is invalid: expected an object {' and '.join(missing)}, got {fields.get(missing[0])!r:.80}."
        )
    check_common_values(fields, source)
    _check_rules(fields, CHAT_RULES, source)
    check_vision_fields(fields["vision_config"], source, "vision_config.")
    check_llm_fields(fields["llm_config"], source, "llm_config.")
    if base_model := fields.get("base_model"):
        _check_rules({"path": None, "fingerprint": None} | base_model, BASE_MODEL_RULES, source, "base_model.")
    patch_size, ratio = fields["vision_config"].get("patch_size"), fields.get("downsample_ratio")
    tile_size = fields.get("force_image_size") or fields["vision_config"].get("image_size")
    if patch_size and ratio and tile_size and tile_size % (token_size := patch_size * round(1 / ratio)):
        name = "force_image_size" if fields.get("force_image_size") else "vision_config.image_size"
        raise ValueError(
            f"{source} is invalid: {name} {tile_size} is not a multiple of {token_size} pixels, the side of an image "
            "token (vision_config.patch_size / downsample_ratio)."
        )


def check_vision_config(fields: Mapping, source: str | Path) -> None:
    """Raise a ValueError unless these can be the fields of a vision encoder."""
    model_type = fields.get("model_type", VISION_MODEL_TYPE)
    if model_type != VISION_MODEL_TYPE:
        raise ValueError(f"{source} has model_type {model_type!r:.80}, expected {VISION_MODEL_TYPE!r}: another model.")
    check_common_values(fields, source)
    check_vision_fields(fields, source)


def check_llm_config(fields: Mapping, source: str | Path) -> None:
    """Raise a ValueError unless these can be the fields of an LLM."""
    check_common_values(fields, source)
    check_llm_fields(fields, source)


def check_common_values(fields: Mapping, source: str | Path) -> None:
    """Check what holds for values of any key, at any depth.

    Raises:
        ValueError: a value is unsafe, not finite or beyond 32 bits, or a key is a method of the configuration class.
    """
    refuse_unsafe_values(fields, source)
    for path, value in iterate_values(fields, source):
        name = path.rpartition(".")[2]
        if (type(value) is int and abs(value) > MAX_INT) or (type(value) is float and not math.isfinite(value)):
            raise ValueError(f"{source} is invalid: {path} {value!r:.80} is not finite or exceeds 32 bits.")
        if name.startswith("__") or callable(getattr(PretrainedConfig, name, None)):
            raise ValueError(f"{source} is invalid: {path} is the name of a method, not of a value; remove it.")
        if "drop" in name and type(value) in (int, float) and not PROBABILITY.is_valid(value):
            raise ValueError(f"{source}: {path} {value} is invalid: expected {PROBABILITY.expected}.")
        if name in COMMON_RULES:
            _check_value(path, value, COMMON_RULES[name], source)


def check_vision_fields(fields: Mapping, source: str | Path, prefix: str = "") -> None:
    """Check the fields of InternViT; `prefix` is their path in the file."""
    _check_rules(fields, VISION_RULES, source, prefix)
    _check_divisible(fields, "hidden_size", "num_attention_heads", source, prefix)
    if fields.get("image_size") and fields["image_size"] < fields.get("patch_size", 1):
        raise ValueError(
            f"{source}: {prefix}image_size {fields['image_size']} is invalid: expected at least patch_size "
            f"{fields['patch_size']}."
        )


def check_llm_fields(fields: Mapping, source: str | Path, prefix: str = "") -> None:
    """Check fields that most LLMs have; `prefix` is their path in the file."""
    _check_rules(fields, LLM_RULES, source, prefix)
    _check_divisible(fields, "num_attention_heads", "num_key_value_heads", source, prefix)
    pad_token_id, vocab_size = fields.get("pad_token_id"), fields.get("vocab_size")
    if pad_token_id is not None and vocab_size is not None and pad_token_id >= vocab_size:
        raise ValueError(
            f"{source}: {prefix}pad_token_id {pad_token_id} is invalid: expected an id below vocab_size {vocab_size}."
        )


def _check_rules(fields: Mapping, rules: Mapping[str, Rule], source: str | Path, prefix: str = "") -> None:
    for key in fields.keys() & rules.keys():
        _check_value(f"{prefix}{key}", fields[key], rules[key], source)


def _check_value(path: str, value: Any, rule: Rule, source: str | Path) -> None:
    if not (rule.is_valid(value) or (value is None and not rule.required)):
        raise ValueError(f"{source}: {path} {value!r:.80} is invalid: expected {rule.expected}.")


def _check_divisible(fields: Mapping, multiple: str, divisor: str, source: str | Path, prefix: str) -> None:
    value, divided_by = fields.get(multiple), fields.get(divisor)
    if is_size(value) and is_size(divided_by) and value % divided_by:
        raise ValueError(f"{source}: {prefix}{multiple} {value} is not a multiple of {divisor} {divided_by}.")
