"""Compare a configuration with the shapes of the weights, before memory is taken.

The headers of safetensors files tell the names and shapes of all tensors. A model of the configuration is built on the
meta device, where parameters have shapes and no content. Where the two contradict each other, nothing is loaded.
"""

import copy
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from internvl.model.internvl_chat.checkpoint_keys import check_checkpoint_keys
from internvl.model.internvl_chat.safe_loading import iterate_values, one_line_file_errors
from internvl.model.lora import LORA_RANK_FIELDS
from internvl.regular_files import read_json_object, read_safetensors_header

Shapes = Mapping[str, tuple[int, ...]]
WEIGHTS_FILE, INDEX_FILE, ADAPTER_FILE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def check_model_fits_weights(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    folder: Path,
    key_mapping: Mapping[str, str],
    may_lack_head: bool = False,
) -> None:
    """Raise a ValueError if a configuration describes another model than the weights.

    Integer weights are refused, too: transformers would convert them. Of pickled and of quantized weights only the
    number of parameters is compared. A folder without weights passes: transformers names what it expects.

    Args:
        key_mapping: regular expression -> replacement, for names of tensors; as in `from_pretrained`.
        may_lack_head: the LM head may be missing, because it is tied to the embedding.
    """
    entries = {_rename(name, key_mapping): entry for name, entry in read_weight_entries(folder).items()}
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    num_pickled_bytes = 0 if shapes else sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin"))
    if not shapes and not num_pickled_bytes:
        return
    if shapes:
        _check_num_layers(config, shapes, folder)
    with one_line_file_errors(folder / "config.json"), torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if not shapes or getattr(config, "quantization_config", None):
        # Shapes of quantized weights are others. One byte holds at most two of them.
        num_elements, capacity = (
            _count_elements(expected, expected),
            num_pickled_bytes or _count_elements(shapes, shapes),
        )
        if num_elements > 2 * capacity:
            raise ValueError(
                f"{folder / 'config.json'} describes {num_elements:,} parameters, more than the weights hold: "
                f"{capacity:,} bytes."
            )
        return
    head = model.get_output_embeddings() if may_lack_head else None
    optional = {f"{name}.weight" for name, module in model.named_modules() if head is not None and module is head}
    missing, unexpected = expected.keys() - shapes.keys() - optional, shapes.keys() - expected.keys()
    common = sorted(expected.keys() & shapes.keys())
    mismatched = [(name, shapes[name], expected[name]) for name in common if shapes[name] != expected[name]]
    not_floating = [(name, entries[name]["dtype"]) for name in common if not is_floating(entries[name]["dtype"])]
    # transformers renames and joins tensors of some models while it loads them, which keeps the number of elements.
    if mismatched or not_floating or _count_elements(missing, expected) > _count_elements(unexpected, shapes):
        info: dict[str, Collection] = {"missing_keys": missing, "unexpected_keys": unexpected}
        info |= {"mismatched_keys": mismatched, "not_floating_keys": not_floating}
        check_checkpoint_keys(f"{folder}{_describe_sizes(config, mismatched)}", info)


def check_adapter_ranks(config: PretrainedConfig, folder: Path) -> None:
    """Check the LoRA ranks of a configuration against the adapters beside it."""
    for part, field in LORA_RANK_FIELDS.items():
        rank, file = getattr(config, field), folder / part / ADAPTER_FILE
        if not rank or not file.is_file():
            continue
        # lora_A (r, in); adapters on experts stack theirs: (experts * r, in)
        rows = {shape[0] for name, shape in read_tensor_shapes(file).items() if "lora_A" in name and shape}
        if rows and all(num_rows % rank for num_rows in rows):
            raise ValueError(
                f"{folder / 'config.json'}: {field} {rank} is invalid: the adapters in {file} have rank {min(rows)}."
            )


def read_weight_entries(folder: Path) -> dict[str, dict]:
    """Read `dtype` and `shape` of all tensors that transformers would load from a folder.

    Raises:
        ValueError: a file is damaged, truncated or empty.
    """
    file_name = read_json_object(folder / "config.json").get("transformers_weights") or WEIGHTS_FILE
    names = {file_name} if (folder / file_name).is_file() else set()
    if not names and (folder / INDEX_FILE).is_file():
        names = set(read_json_object(folder / INDEX_FILE)["weight_map"].values())
    headers = (read_safetensors_header(folder / file)[0] for file in sorted(names))
    return {name: entry for entries in headers for name, entry in entries.items()}


def is_floating(dtype: str) -> bool:
    """Return whether a dtype of a safetensors header, such as BF16 or I32, is floating point."""
    return dtype.startswith(("F", "BF"))


def read_tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes from the header of a safetensors file."""
    entries, _ = read_safetensors_header(file)
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def _check_num_layers(config: PretrainedConfig, shapes: Shapes, folder: Path) -> None:
    """Raise a ValueError if the configuration has more layers than the weights.

    Building a layer takes time, even without content.
    """
    part_names = {"vision_model.": "vision_config", "language_model.": "llm_config"}
    parts = {prefix: (name, getattr(config, name)) for prefix, name in part_names.items() if hasattr(config, name)}
    for prefix, (name, part_config) in (parts or {"": ("", config)}).items():
        numbers = {match[1] for key in shapes if key.startswith(prefix) and (match := LAYER_NUMBER.search(key))}
        num_layers = getattr(part_config, "num_hidden_layers", 0)
        if num_layers > len(numbers):
            key = f"{name}.num_hidden_layers".lstrip(".")
            raise ValueError(
                f"{folder / 'config.json'}: {key} {num_layers} does not match the weights, which have {len(numbers)} "
                "layers."
            )


def _describe_sizes(config: PretrainedConfig, mismatched: list[tuple]) -> str:
    """Return the fields that have the sizes which the weights do not have."""
    sizes = {size for _, actual, expected in mismatched for size in set(expected) - set(actual)}
    fields = [
        f"{path} {value}"
        for path, value in iterate_values(config.to_dict(), "")
        if type(value) is int and value in sizes
    ]
    return f" ({', '.join(sorted(fields))})" if fields else ""


def _rename(name: str, key_mapping: Mapping[str, str]) -> str:
    for pattern, replacement in key_mapping.items():
        name = re.sub(pattern, replacement, name)
    return name


def _count_elements(names: Collection[str], shapes: Shapes) -> int:
    return sum(math.prod(shapes[name]) for name in names)
