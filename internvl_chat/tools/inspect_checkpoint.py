"""Describe a checkpoint folder: kind, sizes, adapters, how to load it.

    internvl inspect DIR

Reads the JSON files and the headers of the safetensors files, but no tensor.
"""

import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import NamedTuple

from internvl.checkpoint.optimizer_state import OPTIMIZER_STATE_FILE
from internvl.checkpoint.trainer_state import TRAINER_STATE_FILE, read_trainer_state
from internvl.command_line import CHAT_MODEL_TYPE, exit_on_user_error
from internvl.model.adapter_io import find_adapter_dirs, read_adapter_config
from internvl.model.auxiliary_files import PREPROCESSOR_FILE, find_missing_code
from internvl.model.internvl_chat.adapter_checkpoint import ADAPTER_FILE, TRAINED_TENSORS_FILE
from internvl.model.internvl_chat.safe_loading import ADAPTER_CONFIG_FILE
from internvl.model.lora import LORA_RANK_FIELDS
from internvl.regular_files import read_json_object, read_safetensors_header
from internvl.tool_parser import ToolParser

HF_MODEL_TYPE = "internvl"
# Part of the model -> pattern of its tensor names in the custom and the HF format. The first match counts.
PART_PATTERNS = {
    "vision_model": re.compile(r"(^|\.)(vision_model|vision_tower)\."),
    "mlp1": re.compile(r"(^|\.)(mlp1|multi_modal_projector)\."),
    "language_model": re.compile(r"(^|\.)(language_model|lm_head)\."),
}
# Kind of a tensor -> its description.
TENSOR_KINDS = {"weights": "weights", "trained": "trained weights that replace the base's", "adapters": "adapters"}
SERVED_FILES = ("tokenizer_config.json", "generation_config.json", PREPROCESSOR_FILE)
LOAD_CHAT_MODEL = "InternVLChatModel.from_pretrained({0})"
# Kind of a checkpoint -> what loads or converts it.
LOADERS = {
    "full checkpoint": [LOAD_CHAT_MODEL, "--model_name_or_path {0}", "internvl convert to-hf"],
    "merged checkpoint": [LOAD_CHAT_MODEL, "--model_name_or_path {0}", "internvl convert to-hf"],
    "full checkpoint with adapters": [LOAD_CHAT_MODEL, "internvl merge", "internvl export"],
    "adapter checkpoint": [
        LOAD_CHAT_MODEL,
        "PeftModel.from_pretrained(model.PART, {0}/PART)",
        "internvl merge",
        "internvl export",
    ],
    "HF checkpoint": [
        "AutoModelForImageTextToText.from_pretrained({0})",
        "AutoProcessor.from_pretrained({0})",
        "internvl convert from-hf",
    ],
    "PEFT adapter": ["PeftModel.from_pretrained(model, {0})"],
}


class Size(NamedTuple):
    """Number of parameters and bytes."""

    num_parameters: int
    num_bytes: int

    def __str__(self):
        return f"{_format_si(self.num_parameters).strip()} parameters, {_format_si(self.num_bytes)}B"


class TensorHeader(NamedTuple):
    """Name and size of a tensor in a safetensors file."""

    name: str
    num_values: int
    num_bytes: int


@exit_on_user_error
def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("path", metavar="DIR", help="a checkpoint, the output of a run, or a folder of adapters")
    args = parser.parse_args(argv)
    print(format_table(describe_checkpoint(Path(args.path))))


def describe_checkpoint(folder: Path) -> list[tuple[str, str]]:
    """Collect labels and values of the table.

    Raises:
        ValueError: `folder` holds no checkpoint.
    """
    config = _read_config(folder)
    sizes, adapters = measure_tensors(folder), read_adapter_settings(folder)
    kind = classify_checkpoint(folder, config, sizes, adapters)
    rows = [("Folder", str(folder)), ("Kind", kind), ("Base checkpoint", _describe_base(config))]
    rows += _describe_llm(config)
    for part in [*LORA_RANK_FIELDS, "other"]:
        # Kind of tensors -> description, of the kinds that this part has.
        texts = {tensors: text for tensors, text in TENSOR_KINDS.items() if (tensors, part) in sizes}
        if part in adapters:
            texts["adapters"] = "adapters ({variant}, rank {r}, alpha {alpha})".format(**adapters[part])
        rows += [(part, f"{text}: {sizes.get((tensors, part), 'no tensors here')}") for tensors, text in texts.items()]
    if (folder / TRAINER_STATE_FILE).exists():
        state = read_trainer_state(folder)
        rows.append(("Step", f"{state['global_step']} of {state.get('max_steps')} (epoch {state.get('epoch', 0):.3g})"))
    if kind != "PEFT adapter" and (missing := list_missing_files(folder)):
        rows.append(("Missing files", ", ".join(missing)))
    return rows + [("Load with", loader.format(folder)) for loader in LOADERS[kind]]


def classify_checkpoint(folder: Path, config: dict, sizes: dict, adapters: dict) -> str:
    """Return the kind of a checkpoint, a key of `LOADERS`."""
    model_type, tensor_kinds = config.get("model_type"), {kind for kind, _ in sizes}
    if not sizes or (model_type not in (CHAT_MODEL_TYPE, HF_MODEL_TYPE) and not adapters):
        type_text = f"config.json has model_type {model_type!r}" if config else "config.json is missing"
        raise ValueError(
            f"{folder} is not a checkpoint of a chat model: {type_text}; safetensors files hold "
            f"{', '.join(sorted(tensor_kinds)) or 'nothing'}"
        )
    if model_type not in (CHAT_MODEL_TYPE, HF_MODEL_TYPE):
        return "PEFT adapter"
    if model_type == HF_MODEL_TYPE:
        return "HF checkpoint"
    if "weights" not in tensor_kinds:
        return "adapter checkpoint"
    if adapters:
        return "full checkpoint with adapters"
    # A run that starts from a merged checkpoint copies `merged_from`, but also saves a trainer state.
    is_merged = config.get("merged_from") and not (folder / "trainer_state.json").is_file()
    return "merged checkpoint" if is_merged else "full checkpoint"


def list_missing_files(folder: Path) -> list[str]:
    """List files that servers read and a checkpoint lacks."""
    names = {file.name for file in folder.iterdir() if file.is_file()}
    return [name for name in SERVED_FILES if name not in names] + find_missing_code(folder, names)


def measure_tensors(folder: Path) -> dict[tuple[str, str], Size]:
    """Return the size of the tensors in a folder by (kind, part).

    Kinds are those of `TENSOR_KINDS`. Adapters that are both among the weights and in PEFT folders count once.
    """
    num_parameters, num_bytes = Counter(), Counter()
    kinds_by_file = {TRAINED_TENSORS_FILE: "trained", ADAPTER_FILE: "adapters"}
    for file in folder.glob("*.safetensors"):
        for header in () if file.name == OPTIMIZER_STATE_FILE else read_tensor_headers(file):
            kind = "adapters" if ".lora_" in header.name else kinds_by_file.get(file.name, "weights")
            part = next((part for part, pattern in PART_PATTERNS.items() if pattern.search(header.name)), "other")
            num_parameters[kind, part] += header.num_values
            num_bytes[kind, part] += header.num_bytes
    for part, adapter_dir in find_adapter_dirs(folder).items():
        headers = [header for file in adapter_dir.glob("*.safetensors") for header in read_tensor_headers(file)]
        num_parameters["adapters", part] = sum(header.num_values for header in headers)
        num_bytes["adapters", part] = sum(header.num_bytes for header in headers)
    return {key: Size(num_parameters[key], num_bytes[key]) for key in num_parameters}


def read_tensor_headers(file: Path) -> list[TensorHeader]:
    """Read the headers of a safetensors file."""
    headers, _ = read_safetensors_header(file)
    return [
        TensorHeader(name, prod(header["shape"]), header["data_offsets"][1] - header["data_offsets"][0])
        for name, header in headers.items()
    ]


def read_adapter_settings(folder: Path) -> dict[str, dict]:
    """Return r, alpha and variant of each part's adapters.

    In upstream's checkpoints config.json has the rank only; alpha is twice the rank. PEFT's files and our
    `lora_settings` have precedence.
    """
    config = _read_config(folder)
    ranks = {part: config.get(field) for part, field in LORA_RANK_FIELDS.items()}
    settings = {part: {"r": rank, "alpha": 2 * rank, "variant": "lora"} for part, rank in ranks.items() if rank}
    peft_configs = {part: read_adapter_config(path) for part, path in find_adapter_dirs(folder).items()}
    if not config and (folder / ADAPTER_CONFIG_FILE).exists():
        # One PEFT folder for one or more parts, as export_adapters.py writes it.
        parts = {part for kind, part in measure_tensors(folder) if kind == "adapters"}
        peft_configs = dict.fromkeys(sorted(parts, key=[*LORA_RANK_FIELDS, "other"].index), read_adapter_config(folder))
    for part, c in peft_configs.items():
        settings[part] = {"r": c["r"], "alpha": c["lora_alpha"], "variant": _name_variant(c)}
    for part, own in (config.get("lora_settings") or {}).items():
        settings[part] = settings.get(part, {}) | {key: own.get(key) for key in ("r", "alpha", "variant")}
    return settings


def _name_variant(peft_config: dict) -> str:
    init = peft_config.get("init_lora_weights")
    names = [name for name in ("dora", "rslora") if peft_config.get(f"use_{name}")]
    return " ".join([*names, *([init] if isinstance(init, str) else [])]) or "lora"


def _describe_base(config: dict) -> str:
    if base := config.get("base_model"):
        path = str(base.get("path"))
        hint = "" if Path(path).exists() else "; not found: pass its new path as base_model="
        return f"{path} (fingerprint {base.get('fingerprint')}){hint}"
    if config.get("merged_from"):
        return f"not required (merged from {config['merged_from']})"
    return "not required" if config else "not recorded in this folder"


def _describe_llm(config: dict) -> list[tuple[str, str]]:
    llm = config.get("llm_config") or config.get("text_config")
    if not llm:
        return []
    own = config.get("internvl_chat")  # our additions to a HF checkpoint
    template = config.get("template") or (own.get("template") if isinstance(own, dict) else None)
    names = llm.get("architectures")
    name = names[0] if isinstance(names, list) and names else llm.get("model_type")
    llm_text = f"{name}, {llm.get('num_hidden_layers')} layers, hidden size {llm.get('hidden_size')}"
    return [("LLM", llm_text), ("Template", template or "not recorded")]


def format_table(rows: list[tuple[str, str]]) -> str:
    """Format rows in two columns; a label that repeats is printed once."""
    width = max(len(label) for label, _ in rows) + 1
    lines, previous = [], None
    for label, value in rows:
        lines.append(f"{'' if label == previous else f'{label}:':{width}}  {value}")
        previous = label
    return "\n".join(lines)


def _read_config(folder: Path) -> dict:
    """Read `config.json`; empty if there is none.

    Raises:
        ValueError: a value that is shown has another type.
    """
    file = folder / "config.json"
    config = read_json_object(file) if file.exists() else {}
    objects = {key: config.get(key) or {} for key in ("base_model", "llm_config", "text_config", "lora_settings")}
    settings = objects["lora_settings"]
    if isinstance(settings, dict):
        objects |= {f"lora_settings.{part}": value for part, value in settings.items()}
    for key, value in objects.items():
        if not isinstance(value, dict):
            raise ValueError(f"{file} is invalid: {key} is {value!r:.80}, expected a JSON object.")
    for field in LORA_RANK_FIELDS.values():
        if type(rank := config.get(field) or 0) is not int:
            raise ValueError(f"{file} is invalid: {field} is {rank!r:.80}, expected an integer.")
    return config


def _format_si(number: int) -> str:
    thousands = min((len(str(number)) - 1) // 3, 4)
    return f"{number / 1000**thousands:.3g} {('', 'k', 'M', 'G', 'T')[thousands]}"


if __name__ == "__main__":
    main()
