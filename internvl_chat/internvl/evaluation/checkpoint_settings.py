"""Load a chat checkpoint for evaluation, with the settings of the run that wrote it.

Data flags come from `flags.json` of the run; without it from `config.json` and `preprocessor_config.json`. So samples
are the same as in training.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_data_arguments
from internvl.checkpoint.manifest import list_checkpoints
from internvl.checkpoint.resume_rules import FLAGS_FILE, read_flags_file
from internvl.command_line import require_checkpoint_dir
from internvl.constants import IMG_CONTEXT_TOKEN
from internvl.data.images import NORMALIZATION_STATS
from internvl.model.auxiliary_files import read_normalization
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    is_adapter_checkpoint,
    load_trained_tensors,
    strip_peft_prefix,
)
from internvl.model.internvl_chat.configuration_internvl_chat import get_tile_size
from internvl.model.lora import is_adapter_parameter
from internvl.model.tokenizers.loading import load_tokenizer

# Files of a checkpoint on the hub that loading reads.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def find_chat_checkpoint(path: str | Path) -> Path:
    """Return the folder of a checkpoint; one on the hub is downloaded.

    Args:
        path: a folder, or ORG/NAME on the hub.

    Raises:
        ValueError: the folder does not exist, or cannot be downloaded.
    """
    if Path(path).exists():
        return Path(path)
    if str(path).count("/") != 1 or Path(path).is_absolute():
        raise ValueError(f"the folder {path} does not exist")
    try:
        return Path(snapshot_download(str(path), allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the folder {path} does not exist, and it cannot be downloaded from the hub: {reason}"
        ) from error


def load_chat_config(folder: str | Path) -> InternVLChatConfig:
    """Load the configuration of a chat checkpoint.

    Raises:
        ValueError: the folder holds no chat checkpoint; the message has what to pass or convert instead.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"the folder {folder} does not exist")
    if not (folder / "config.json").is_file() and (checkpoints := list_checkpoints(folder)):
        raise ValueError(f"no checkpoint in {str(folder)!r}, only below it: pass {checkpoints[0]}")
    return InternVLChatConfig.from_pretrained(require_checkpoint_dir(folder))


def build_data_arguments(folder: str | Path, meta_path: str | None = None) -> DataTrainingArguments:
    """Build the data flags that a checkpoint was trained with.

    A run that resumed with other flags has the last ones.

    Raises:
        ValueError: a file is damaged, or has a value that is no valid flag.
    """
    config, flags = load_chat_config(folder), read_run_flags(folder)
    names = {field.name for field in fields(DataTrainingArguments)}
    values = _read_config_flags(folder, config) | {name: flags[name] for name in flags if name in names}
    source = Path(folder) / (FLAGS_FILE if flags else "config.json")
    values["meta_path"] = meta_path
    argv = [f"--{name}={value}" for name, value in values.items() if value is not None]
    try:
        [data_args] = parse_args(argv, (DataTrainingArguments,))
        if meta_path:
            validate_data_arguments(data_args)
    except ValueError as error:
        raise ValueError(f"{source} is invalid: {error}") from error
    return data_args


def read_run_flags(folder: str | Path) -> dict:
    """Read the flags of a checkpoint's run; empty if they are unknown."""
    record = read_flags_file(Path(folder))
    return record["flags"] if record else {}


def _read_config_flags(folder: str | Path, config: InternVLChatConfig) -> dict:
    """Return the data flags that the files of a checkpoint imply."""
    statistics = read_normalization(folder)
    known = {name: (list(mean), list(std)) for name, (mean, std) in NORMALIZATION_STATS.items()}
    normalize_type = next((name for name, values in known.items() if values == statistics), None)
    if config.pad2square and normalize_type is None:
        raise ValueError(
            f"{folder}: images are padded with the mean color {statistics[0]}, which is not supported: expected that "
            f"of {', '.join(NORMALIZATION_STATS)}."
        )
    return {
        "conv_style": config.template,
        "force_image_size": get_tile_size(config),
        "down_sample_ratio": config.downsample_ratio,
        "normalize_type": normalize_type,
        "pad2square": config.pad2square,
        "dynamic_image_size": config.dynamic_image_size,
        "use_thumbnail": config.use_thumbnail,
        "min_dynamic_patch": config.min_dynamic_patch,
        "max_dynamic_patch": config.max_dynamic_patch,
    }


def get_run_dtype(folder: str | Path) -> torch.dtype | None:
    """Return the dtype of the weights in a run; None if unknown."""
    flags = read_run_flags(folder)
    if not flags:
        return None
    if flags.get("bf16") or flags.get("lora_fp32"):
        return torch.bfloat16
    return torch.float16 if flags.get("fp16") else torch.float32


def restore_run_precision(model: InternVLChatModel, folder: str | Path) -> Callable[[], AbstractContextManager]:
    """Give a loaded model the precision in which its run evaluates.

    A run in half precision has its trained weights in fp32, and autocast, unless DeepSpeed has cast all weights. PEFT
    (0.19) loads adapters in fp32.

    Args:
        folder: from which the model was loaded, in the dtype of the run.

    Returns:
        The context in which the model runs.
    """
    flags = read_run_flags(folder)
    is_half = flags.get("bf16") or flags.get("fp16")
    if not is_half and not flags.get("lora_fp32"):
        return nullcontext
    if flags.get("deepspeed") and not flags.get("lora_fp32"):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(get_run_dtype(folder))
        return nullcontext
    if is_adapter_checkpoint(Path(folder)):
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name) or strip_peft_prefix(name) in model.previously_trained:
                parameter.data = parameter.data.float()
        load_trained_tensors(model, folder)  # which loading had rounded
    return partial(torch.autocast, model.device.type, get_run_dtype(folder))


def load_chat_model(
    folder: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[InternVLChatModel, PreTrainedTokenizerBase]:
    """Load a chat model, ready to evaluate, and its tokenizer.

    Args:
        folder: a base checkpoint, the output or a checkpoint of a run, or a merged checkpoint.
        dtype: default: that of the run, or of the checkpoint if it is unknown.
        device: default: the current CUDA device if there is one, else the CPU.
    """
    load_chat_config(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder)
    if IMG_CONTEXT_TOKEN not in tokenizer.get_vocab():
        raise ValueError(f"the tokenizer in {str(folder)!r} has no token {IMG_CONTEXT_TOKEN}: it is not a chat model's")
    model = InternVLChatModel.from_pretrained(folder, dtype=dtype or get_run_dtype(folder) or "auto")
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    return model.eval().to(device), tokenizer
