"""Saving and loading trained tensors without their base model.

An adapter checkpoint is a folder of these files:

    config.json              with `base_model`: path and fingerprint of the base checkpoint, changes made to it
    vision_model/, mlp1/, language_model/       adapters of a part, in PEFT's own format
    trained.safetensors      the other trained tensors, under the names of a model without adapters

The trainer calls `save_adapter_checkpoint`, `InternVLChatModel.from_pretrained` calls `load_adapter_checkpoint`.
"""

import copy
import hashlib
import json
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from internvl.model.internvl_chat.checkpoint_keys import check_checkpoint_keys, find_checkpoint_dir
from internvl.model.internvl_chat.generation import save_generation_config, set_generation_config
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.internvl_chat.resize import resize_embeddings, set_image_size
from internvl.model.internvl_chat.safe_loading import ADAPTER_CONFIG_FILE
from internvl.model.internvl_chat.zero3 import gathered_parameters, get_full_shape
from internvl.model.lora import LORA_RANK_FIELDS, PEFT_PREFIX, is_adapter_parameter, is_peft_model
from internvl.regular_files import open_regular_file, read_json_object, read_safetensors_header

if TYPE_CHECKING:
    from internvl.model.internvl_chat.modeling_internvl_chat import InternVLChatModel

TRAINED_TENSORS_FILE = "trained.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
# A fingerprint reads this many bytes at the beginning, in the middle and at the end of each tensor.
FINGERPRINT_SAMPLE_BYTES = 1024
# Fields of PEFT's adapter_config.json that do not describe the trained adapters.
UNCHECKED_ADAPTER_FIELDS = set(
    "auto_mapping base_model_name_or_path inference_mode init_lora_weights lora_dropout peft_version revision "
    "task_type".split()
)
MAX_NEW_TOKENS = 2**16  # that a run may add to its base model


# -- saving ------------------------------------------------------------------------------------------------------------


def gather_trained_tensors(model: "InternVLChatModel") -> dict[str, torch.Tensor]:
    """Copy all tensors to be saved to the CPU.

    These are the trainable parameters, all adapters, and the parameters that an earlier run trained
    (`model.previously_trained`). A collective under ZeRO-3: all ranks call it.
    """
    state = {}
    for name, parameter in model.named_parameters():
        is_trained = parameter.requires_grad or strip_peft_prefix(name) in model.previously_trained
        if is_trained or is_adapter_parameter(name):
            with gathered_parameters(parameter):
                state[name] = parameter.detach().cpu().clone()
    return state


def save_adapter_checkpoint(model: "InternVLChatModel", folder: str | Path, state: dict[str, torch.Tensor]) -> None:
    """Save adapters, other trained tensors and the configuration, without the tokenizer.

    Args:
        model: its `base_checkpoint` must be set, see `describe_base_checkpoint`.
        state: from `gather_trained_tensors`.
    """
    folder, base_checkpoint = Path(folder), model.base_checkpoint
    assert base_checkpoint is not None
    folder.mkdir(parents=True, exist_ok=True)
    for part in LORA_RANK_FIELDS:
        module = getattr(model, part)
        if is_peft_model(module):
            part_state = {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
            for config in module.peft_config.values():
                config.base_model_name_or_path = base_checkpoint["path"]
            card = folder / part / "README.md"
            card.unlink(missing_ok=True)  # PEFT would read its YAML
            module.save_pretrained(str(folder / part), state_dict=part_state, save_embedding_layers=False)
            card.unlink()  # PEFT's empty model card
    others = {
        strip_peft_prefix(name): tensor.contiguous() for name, tensor in state.items() if not is_adapter_parameter(name)
    }
    if others:
        save_file(others, folder / TRAINED_TENSORS_FILE, metadata={"format": "pt"})
    config = copy.copy(model.config)
    config.architectures = ["InternVLChatModel"]  # also for subclasses, which only training uses
    config.base_model = base_checkpoint
    config.__dict__.pop("quantization_config", None)  # of the weights in memory, not of the base checkpoint
    config.save_pretrained(folder)
    save_generation_config(model, folder)


# -- identity of the base checkpoint -----------------------------------------------------------------------------------


def describe_base_checkpoint(path: str | Path, merged: bool = False) -> dict:
    """Describe the base checkpoint of a run, for `base_model` in `config.json`.

    `path` is where it is, `fingerprint` identifies its weights, `merged` is True if its adapters were merged first.
    `compose.add_special_tokens` adds `known_tokens`: the number of rows whose mean the rows of new tokens are.
    """
    recorded_path = Path(path).resolve() if Path(path).is_dir() else path
    return {"path": str(recorded_path), "fingerprint": fingerprint_weights(path), "merged": merged}


def fingerprint_weights(path: str | Path) -> str:
    """Compute a SHA-256 digest of a checkpoint's weights from samples.

    It covers the name, dtype and shape of each tensor and three samples of its bytes. Training changes every element of
    a tensor, so samples are enough, and a checkpoint of any size takes a second.
    """
    entries = []
    for file in list_weight_files(find_checkpoint_dir(path)):
        names_and_entries, data_start = read_safetensors_header(file)
        with open_regular_file(file) as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            part = file.parent.name if file.name == ADAPTER_FILE else ""
            for name, entry in names_and_entries.items():
                begin, end = (data_start + offset for offset in entry["data_offsets"])
                sample_starts = (begin, (begin + end) // 2, max(begin, end - FINGERPRINT_SAMPLE_BYTES))
                samples = [data[start : min(start + FINGERPRINT_SAMPLE_BYTES, end)] for start in sample_starts]
                description = f"{part} {name} {entry['dtype']} {entry['shape']}"
                entries.append(description.encode() + b"".join(samples))
    if not entries:
        raise ValueError(f"no *.safetensors file in {str(path)!r}: not usable as a base checkpoint")
    return hashlib.sha256(b"\n".join(sorted(entries))).hexdigest()


def list_weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint.

    Files of other checkpoints in subfolders, such as `checkpoint-200/`, are left out.
    """
    adapters = [folder / part / ADAPTER_FILE for part in LORA_RANK_FIELDS]
    return [*sorted(folder.glob("*.safetensors")), *filter(Path.is_file, adapters)]


# -- names of parameters -----------------------------------------------------------------------------------------------


def strip_peft_prefix(name: str) -> str:
    """Return the name of a parameter in a model without adapters."""
    return name.replace(PEFT_PREFIX, "", 1).replace(".token_adapter", "").replace(".base_layer", "")


def get_saved_adapter_name(name: str) -> str:
    """Return the name of an adapter's parameter in PEFT's file.

    PEFT's files omit the adapter's name ("default"). Here and in the result, the name of the part is the prefix.
    """
    name = name.replace(".default", "")
    return name.removesuffix(".weight") if "magnitude_vector" in name else name


# -- loading -----------------------------------------------------------------------------------------------------------


def load_adapter_checkpoint(cls, folder: str | Path, config, base_model: str | Path | None = None, **kwargs):
    """Load the base model of a checkpoint, then its trained tensors.

    Args:
        cls, config: class and configuration of the model.
        base_model: path of the base checkpoint, if it has moved since the checkpoint was saved.
        kwargs: of `cls.from_pretrained`.

    Raises:
        ValueError: the base checkpoint is missing, or has another fingerprint; a tensor is missing, unexpected, of
            another shape or not finite.
    """
    description = config.base_model
    path = str(base_model or description["path"])
    if Path(path).resolve() == Path(folder).resolve():
        raise ValueError(f"{folder}/config.json is invalid: it names its own folder as the base checkpoint.")
    try:
        fingerprint = fingerprint_weights(path)
    except ValueError as error:
        raise ValueError(
            f"The base checkpoint {path} of {folder} is unusable: {error}. Pass base_model=... if it has moved."
        ) from error
    if fingerprint != description["fingerprint"]:
        raise ValueError(
            f"{folder} was trained on a base checkpoint other than {path}: expected weights with the fingerprint "
            f"{description['fingerprint'][:12]}..., got {fingerprint[:12]}..."
        )
    base_config = cls.config_class.from_pretrained(path)
    num_rows, num_base_rows = config.llm_config.vocab_size, base_config.llm_config.vocab_size
    if num_rows > num_base_rows + MAX_NEW_TOKENS:
        raise ValueError(
            f"{folder}/config.json: llm_config.vocab_size {num_rows} is invalid: expected at most {MAX_NEW_TOKENS:,} "
            f"tokens more than the {num_base_rows} of the base checkpoint {path}."
        )
    base_config = build_base_config(base_config, config)
    model = cls.from_pretrained(path, config=base_config, **kwargs)
    # Repeat the changes that the run made to its base model, in the same order.
    if description.get("merged"):
        merge_adapters(model)
    if num_known := description.get("known_tokens"):
        resize_embeddings(model, config.llm_config.vocab_size, num_known)
    set_image_size(model, config.vision_config.image_size)
    for name in (*LORA_RANK_FIELDS.values(), "lora_settings"):
        setattr(model.config, name, getattr(config, name))
    model.add_configured_adapters()
    load_trained_tensors(model, folder)
    set_generation_config(model, folder)
    model.base_checkpoint, model.config.base_model = description | {"path": path}, None
    return model


def build_base_config(base_config, config):
    """Copy `config` with the sizes and adapters of the base checkpoint."""
    config = copy.deepcopy(config)
    config.base_model = getattr(base_config, "base_model", None)
    for name in (*LORA_RANK_FIELDS.values(), "lora_settings"):
        setattr(config, name, getattr(base_config, name))
    config.llm_config.vocab_size = base_config.llm_config.vocab_size
    config.vision_config.image_size = base_config.vision_config.image_size
    config.force_image_size = base_config.force_image_size
    return config


def load_trained_tensors(model: "InternVLChatModel", folder: str | Path, required: Iterable[str] = ()) -> None:
    """Load adapters and trained tensors into a model with the same adapters.

    A collective under ZeRO-3: all ranks call it.

    Args:
        required: names of parameters that the checkpoint must hold, besides the adapters.

    Raises:
        ValueError: as `load_adapter_checkpoint`.
    """
    parameters, tensors = dict(model.named_parameters()), read_trained_tensors(model, folder, required)
    for name, tensor in tensors.items():
        with gathered_parameters(parameters[name]), torch.no_grad():
            parameters[name].copy_(tensor)
    others = (name for name in tensors if not is_adapter_parameter(name))
    model.previously_trained = frozenset(map(strip_peft_prefix, others))


def read_trained_tensors(
    model: "InternVLChatModel", folder: str | Path, required: Iterable[str] = ()
) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint under their names in the model.

    Args:
        required: as for `load_trained_tensors`.

    Raises:
        ValueError: as `load_adapter_checkpoint`.
    """
    folder = Path(folder)
    for part in LORA_RANK_FIELDS:
        _check_adapter_config(folder / part / ADAPTER_CONFIG_FILE, getattr(model, part))
    parameters = dict(model.named_parameters())
    adapters = {get_saved_adapter_name(name): name for name in parameters if is_adapter_parameter(name)}
    others = {strip_peft_prefix(name): name for name in parameters if not is_adapter_parameter(name)}
    tensors = {}
    for part in LORA_RANK_FIELDS:
        for name, tensor in _read_tensors(folder / part / ADAPTER_FILE).items():
            saved_name = f"{part}.{name}"
            tensors[adapters.get(saved_name, saved_name)] = tensor
    for name, tensor in _read_tensors(folder / TRAINED_TENSORS_FILE).items():
        tensors[others.get(name, name)] = tensor
    shapes = {name: get_full_shape(parameter) for name, parameter in parameters.items()}
    loading_info = {
        "missing_keys": [name for name in {*adapters.values(), *required} if name not in tensors],
        "unexpected_keys": [name for name in tensors if name not in parameters],
        "mismatched_keys": [
            (name, tensor.shape, shapes[name])
            for name, tensor in tensors.items()
            if name in parameters and tensor.shape != shapes[name]
        ],
        "not_floating_keys": [(name, t.dtype) for name, t in tensors.items() if not t.is_floating_point()],
        "not_finite_keys": [name for name, tensor in tensors.items() if not tensor.isfinite().all()],
    }
    check_checkpoint_keys(str(folder), loading_info)
    return tensors


def _check_adapter_config(file: Path, module: nn.Module) -> None:
    """Raise a ValueError if PEFT's file describes other adapters than a part has.

    Other programs read the file. Here `config.json` has the settings of the adapters.
    """
    if not is_peft_model(module) or not file.exists():
        return
    config = cast(LoraConfig, module.peft_config[module.active_adapter])
    own = json.loads(json.dumps(config.to_dict(), default=sorted))  # a set of target modules
    saved = {key: getattr(LoraConfig, key, None) for key in own} | read_json_object(file)
    for key in sorted(own.keys() - UNCHECKED_ADAPTER_FIELDS):
        values = [sorted(value) if _is_list_of_names(value) else value or None for value in (saved[key], own[key])]
        if values[0] != values[1]:
            raise ValueError(
                f"{file} is invalid: {key} is {saved[key]!r:.80}, expected {own[key]!r:.80}, as config.json has it."
            )


def _is_list_of_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, if it exists."""
    if not file.exists():
        return {}
    read_safetensors_header(file)
    return load_file(file)


def is_adapter_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder was written by `save_adapter_checkpoint`."""
    file = Path(folder) / "config.json"
    return file.exists() and bool(read_json_object(file).get("base_model"))
