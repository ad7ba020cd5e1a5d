"""What a run trained, on disk, without the weights it stands on.

    FOLDER/config.json              with `base_model`: path, fingerprint, and what was done to the base
    FOLDER/vision_model, mlp1, language_model       adapters of a part, in PEFT's own format
    FOLDER/trained.safetensors      the other trained tensors, under the names of a model without adapters

Written by the trainer; `InternVLChatModel.from_pretrained` reads it by `load_adapter_checkpoint`.
"""

import copy
import hashlib
import json
import mmap
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from internvl.model.internvl_chat.checkpoint_keys import folder_of, refuse_wrong_keys
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.internvl_chat.resize import gathered_parameters, resize_image, resize_tokens
from internvl.model.lora import LORA_RANK_FIELDS, is_peft_model, unwrap_peft

TRAINED_TENSORS_FILE = "trained.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
FINGERPRINT_SAMPLE_BYTES = (
    1024  # bytes at the beginning, the middle and the end of a tensor that its fingerprint looks at
)


# -- writing -----------------------------------------------------------------------------------------------------------


def gather_trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> copy on the CPU of every tensor that is to be saved; a collective under ZeRO-3.

    These are the parameters that train, all adapters, and what an earlier run trained (`model.previously_trained`).
    """
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or is_adapter(name) or strip_peft_prefix(name) in model.previously_trained:
            with gathered_parameters(parameter):
                state[name] = parameter.detach().cpu().clone()
    return state


def save_adapter_checkpoint(model: nn.Module, folder: str | Path, state: dict[str, torch.Tensor]) -> None:
    """Writes the layout above, but for the tokenizer; `state` is of `gather_trained_tensors`,
    `model.base_checkpoint` is set."""
    folder = Path(folder)
    for part in LORA_RANK_FIELDS:
        module = getattr(model, part)
        if is_peft_model(module):
            own = {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
            for config in module.peft_config.values():
                config.base_model_name_or_path = model.base_checkpoint["path"]
            module.save_pretrained(folder / part, state_dict=own, save_embedding_layers=False)
            (folder / part / "README.md").unlink()  # a form to fill in
    others = {strip_peft_prefix(name): tensor.contiguous() for name, tensor in state.items() if not is_adapter(name)}
    if others:
        save_file(others, folder / TRAINED_TENSORS_FILE, metadata={"format": "pt"})
    config = copy.copy(model.config)
    config.architectures = [type(model).__name__]
    config.base_model = model.base_checkpoint
    config.__dict__.pop("quantization_config", None)  # of the weights in memory, not of the base
    config.save_pretrained(folder)
    unwrap_peft(model.language_model).generation_config.save_pretrained(folder)


def describe_base_checkpoint(path: str | Path, merged: bool = False) -> dict:
    """What a checkpoint remembers of its base: where it is, what it holds, whether its adapters were merged first.

    `checkpoint.add_special_tokens` adds `known_tokens`: of how many rows the rows of new tokens are the mean.
    """
    local = Path(path).resolve() if Path(path).is_dir() else path
    return {"path": str(local), "fingerprint": fingerprint_weights(path), "merged": merged}


def fingerprint_weights(path: str | Path) -> str:
    """A digest of a checkpoint's tensors: all names, types and shapes, and three samples of the bytes of each.

    Training changes every element of a tensor, so that a sample tells; a checkpoint of any size takes a second.
    """
    entries = []
    for file in weight_files(folder_of(path)):
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = 8 + int.from_bytes(data[:8], "little")
            for name, entry in json.loads(data[8:start]).items():
                if name != "__metadata__":
                    begin, end = (start + offset for offset in entry["data_offsets"])
                    places = (begin, (begin + end) // 2, max(begin, end - FINGERPRINT_SAMPLE_BYTES))
                    samples = [data[place : min(place + FINGERPRINT_SAMPLE_BYTES, end)] for place in places]
                    part = file.parent.name if file.name == ADAPTER_FILE else ""
                    kind = f"{part} {name} {entry['dtype']} {entry['shape']}"
                    entries.append(kind.encode() + b"".join(samples))
    if not entries:
        raise ValueError(f"no *.safetensors file in {str(path)!r}: it is no checkpoint to stand on")
    return hashlib.sha256(b"\n".join(sorted(entries))).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's tensors; not those of the checkpoints in it."""
    adapters = [folder / part / ADAPTER_FILE for part in LORA_RANK_FIELDS]
    return [*sorted(folder.glob("*.safetensors")), *filter(Path.is_file, adapters)]


# -- names -------------------------------------------------------------------------------------------------------------


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def strip_peft_prefix(name: str) -> str:
    """The name of a parameter in a model without adapters."""
    return name.replace("base_model.model.", "", 1).replace(".base_layer", "")


def name_in_file(name: str) -> str:
    """The name that PEFT saves an adapter's parameter under, part of the model included."""
    name = name.replace(".default", "")
    return name.removesuffix(".weight") if "magnitude_vector" in name else name


# -- reading -----------------------------------------------------------------------------------------------------------


def load_adapter_checkpoint(cls, folder: str | Path, config, base_model: str | Path | None = None, **kwargs):
    """The base of a checkpoint with what was trained on top.

    Args:
        cls, config: of the model to make.
        base_model: where the base is now; by default where it was.
        kwargs: of `cls.from_pretrained`.

    Raises:
        ValueError: the base is not there or another one; a tensor is missing, unknown, of another shape or not finite.
    """
    note = config.base_model
    path = str(base_model or note["path"])
    if Path(path).resolve() == Path(folder).resolve():
        raise ValueError(f"{folder} says that it stands on itself")
    try:
        found = fingerprint_weights(path)
    except ValueError as error:
        raise ValueError(f"{folder} stands on the base {path}: {error}; say base_model=... if it has moved") from error
    if found != note["fingerprint"]:
        raise ValueError(
            f"{folder} was trained on another base than {path}: its tensors have the fingerprint {found[:12]}..., not "
            f"{note['fingerprint'][:12]}..."
        )
    model = cls.from_pretrained(path, config=config_with_base(cls.config_class.from_pretrained(path), config), **kwargs)
    if note.get("merged"):
        merge_adapters(model)
    if known := note.get("known_tokens"):
        resize_tokens(model, config.llm_config.vocab_size, known)
    resize_image(model, config.vision_config.image_size)
    for name in (*LORA_RANK_FIELDS.values(), "lora_settings"):
        setattr(model.config, name, getattr(config, name))
    model.add_configured_adapters()
    load_trained_tensors(model, folder)
    model.base_checkpoint, model.config.base_model = note | {"path": path}, None
    return model


def config_with_base(base, config):
    """`config`, with the sizes and adapters of the base where these differ."""
    config = copy.deepcopy(config)
    config.base_model = getattr(base, "base_model", None)
    for name in (*LORA_RANK_FIELDS.values(), "lora_settings"):
        setattr(config, name, getattr(base, name))
    config.llm_config.vocab_size = base.llm_config.vocab_size
    config.vision_config.image_size, config.force_image_size = base.vision_config.image_size, base.force_image_size
    return config


def load_trained_tensors(model: nn.Module, folder: str | Path) -> None:
    """Puts what `save_adapter_checkpoint` wrote into a model with the same adapters; a collective under ZeRO-3.

    Raises:
        ValueError: as `load_adapter_checkpoint`.
    """
    own, tensors = dict(model.named_parameters()), read_trained_tensors(model, folder)
    for name, tensor in tensors.items():
        with gathered_parameters(own[name]), torch.no_grad():
            own[name].copy_(tensor)
    model.previously_trained = frozenset(strip_peft_prefix(name) for name in tensors if not is_adapter(name))


def read_trained_tensors(model: nn.Module, folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder under their names in the model, if they fit; ValueError as `load_adapter_checkpoint`."""
    folder = Path(folder)
    own = dict(model.named_parameters())
    adapters = {name_in_file(name): name for name in own if is_adapter(name)}
    others = {strip_peft_prefix(name): name for name in own if not is_adapter(name)}
    stored = {f"{part}.{k}": t for part in LORA_RANK_FIELDS for k, t in read(folder / part / ADAPTER_FILE).items()}
    rest = read(folder / TRAINED_TENSORS_FILE)
    tensors = {adapters.get(name, name): tensor for name, tensor in stored.items()}
    tensors |= {others.get(name, name): tensor for name, tensor in rest.items()}
    shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in own.items()}
    info = {
        "missing_keys": [name for name in adapters.values() if name not in tensors],
        "unexpected_keys": [name for name in tensors if name not in own],
        "mismatched_keys": [(n, t.shape, shapes[n]) for n, t in tensors.items() if n in own and t.shape != shapes[n]],
        "not_finite_keys": [name for name, tensor in tensors.items() if not tensor.isfinite().all()],
    }
    refuse_wrong_keys(str(folder), info)
    return tensors


def read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, none if it is not there; ValueError if it is cut short or something else."""
    try:
        return load_file(file) if file.is_file() else {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def is_adapter_checkpoint(folder: str | Path) -> bool:
    """Whether what lies there was written by `save_adapter_checkpoint`."""
    file = Path(folder) / "config.json"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("base_model"))
