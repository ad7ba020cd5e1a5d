"""Says what a checkpoint folder is and what opens it: `python tools/inspect_checkpoint.py DIR` prints one table.

Reads the JSON files and the headers of the safetensors files, never a tensor.
"""

import argparse
import json
import re
from collections import Counter, defaultdict
from math import prod
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from internvl.command_line import CHAT, command
from internvl.model.adapter_io import part_folders
from internvl.model.lora import LORA_RANK_FIELDS

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
NATIVE = "internvl"
# Which part a tensor belongs to, by the name in either format; the first that is found.
PARTS = {
    "vision_model": re.compile(r"(^|\.)(vision_model|vision_tower)\."),
    "mlp1": re.compile(r"(^|\.)(mlp1|multi_modal_projector)\."),
    "language_model": re.compile(r"(^|\.)(language_model|lm_head)\."),
}
HELD = {"weights": "whole weights", "trained": "trained weights in place of the base's", "adapters": "adapters"}
CONVERT = "tools/internvl_custom2hf.py"
OPENED = {
    "full": ["InternVLChatModel.from_pretrained({0})", "--model_name_or_path {0}", CONVERT],
    "merged": ["InternVLChatModel.from_pretrained({0})", "--model_name_or_path {0}", CONVERT],
    "full with adapters": ["InternVLChatModel.from_pretrained({0})", "tools/merge_lora.py", "tools/export_adapters.py"],
    "adapters on a base": [
        "InternVLChatModel.from_pretrained({0})",
        "PeftModel.from_pretrained(model.PART, {0}/PART)",
        "tools/merge_lora.py",
        "tools/export_adapters.py",
    ],
    "native": ["AutoModelForImageTextToText and AutoProcessor, .from_pretrained({0})", "tools/internvl_hf2custom.py"],
    "adapter of one model or part": ["PeftModel.from_pretrained(model, {0})"],
}


class Size(NamedTuple):
    parameters: int
    nbytes: int

    def __str__(self):
        return f"{_short(self.parameters).strip()} parameters, {_short(self.nbytes)}B"


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", metavar="DIR", help="a checkpoint, a run's output or a folder of adapters")
    print(table(describe(Path(parser.parse_args(argv).path))))


def describe(folder: Path) -> list[tuple[str, str]]:
    """Names and values of the table's lines. ValueError if `folder` holds no checkpoint."""
    config, sizes, adapters = _json(folder / "config.json"), sizes_of(folder), adapters_of(folder)
    kind = kind_of(folder, config, sizes, adapters)
    lines = [("folder", str(folder)), ("kind", kind), ("base", _base(config, adapters)), *_model(config)]
    for part in [*LORA_RANK_FIELDS, "other"]:
        told = {what: words for what, words in HELD.items() if (what, part) in sizes}
        if part in adapters:
            told["adapters"] = "adapters: {variant}, rank {r}, alpha {alpha}".format(**adapters[part])
        lines += [(part, f"{words}: {sizes.get((what, part), 'no tensors here')}") for what, words in told.items()]
    state = _json(folder / "trainer_state.json")
    if state:
        lines.append(("steps", f"{state['global_step']} of {state['max_steps']}, epoch {state['epoch'] or 0:.3g}"))
    return lines + [("opened with", way.format(folder)) for way in OPENED[kind]]


def kind_of(folder: Path, config: dict, sizes: dict, adapters: dict) -> str:
    model_type, here = config.get("model_type"), {what for what, _ in sizes}
    if not sizes or (model_type not in (CHAT, NATIVE) and not adapters):
        found = f"its config.json is of type {model_type!r}" if config else "there is no config.json"
        raise ValueError(f"{folder} is no checkpoint of a chat model: {found}, safetensors of {sorted(here) or 'none'}")
    if model_type not in (CHAT, NATIVE):
        return "adapter of one model or part"
    if model_type == NATIVE:
        return "native"
    if "weights" not in here:
        return "adapters on a base"
    if adapters:
        return "full with adapters"
    return "merged" if config.get("merged_from") and not (folder / "trainer_state.json").is_file() else "full"


def sizes_of(folder: Path) -> dict[tuple[str, str], Size]:
    """(weights, trained or adapters; part) -> what of it lies in `folder`, adapters counted once."""
    own = part_folders(folder)
    parameters, nbytes = Counter(), Counter()
    for file in folder.glob("*.safetensors"):
        kinds = {"trained.safetensors": "trained", "adapter_model.safetensors": "adapters"}
        for name, count, size in headers(file):
            kind = "adapters" if ".lora_" in name else kinds.get(file.name, "weights")
            part = next((part for part, pattern in PARTS.items() if pattern.search(name)), "other")
            parameters[kind, part] += count
            nbytes[kind, part] += size
    for part, place in own.items():
        rows = [row for file in place.glob("*.safetensors") for row in headers(file)]
        parameters["adapters", part] = sum(count for _, count, _ in rows)
        nbytes["adapters", part] = sum(size for *_, size in rows)
    return {key: Size(parameters[key], nbytes[key]) for key in parameters}


def headers(file: Path) -> list[tuple[str, int, int]]:
    """Name, numbers and bytes of each tensor of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file ({error})") from error
    counts = {name: prod(part.get_shape()) for name, part in slices.items()}
    return [(name, counts[name], counts[name] * BYTES.get(part.get_dtype(), 1)) for name, part in slices.items()]


def adapters_of(folder: Path) -> dict[str, dict]:
    """Part -> r, alpha and variant of its adapters, as config.json or PEFT's own files tell."""
    config = _json(folder / "config.json")
    ranks = {part: config.get(rank) for part, rank in LORA_RANK_FIELDS.items()}
    found = {part: {"r": r, "alpha": 2 * r, "variant": "lora"} for part, r in ranks.items() if r}
    files = {part: _json(place / "adapter_config.json") for part, place in part_folders(folder).items()}
    if not config and (alone := _json(folder / "adapter_config.json")):
        parts = {part for what, part in sizes_of(folder) if what == "adapters"}
        files = dict.fromkeys(sorted(parts, key=[*LORA_RANK_FIELDS, "other"].index), alone)
    found |= {part: {"r": c["r"], "alpha": c["lora_alpha"], "variant": _variant(c)} for part, c in files.items()}
    for part, settings in (config.get("lora_settings") or {}).items():
        found[part] = found.get(part, {}) | {key: settings[key] for key in ("r", "alpha", "variant")}
    return found


def _variant(config: dict) -> str:
    start = config.get("init_lora_weights")
    names = [name for name in ("dora", "rslora") if config.get(f"use_{name}")]
    return " ".join([*names, *([start] if isinstance(start, str) else [])]) or "lora"


def _base(config: dict, adapters: dict) -> str:
    base = config.get("base_model")
    if base:
        there = "" if Path(base["path"]).exists() else ", which is not here: name its place by base_model="
        return f"{base['path']} (fingerprint {base.get('fingerprint')}){there}"
    if config.get("merged_from"):
        return f"none is needed; merged from {config['merged_from']}"
    return "none is needed" if config else "the model these adapters were made for; the folder does not name it"


def _model(config: dict) -> list[tuple[str, str]]:
    llm = config.get("llm_config") or config.get("text_config")
    if not llm:
        return []
    template = config.get("template") or (config.get("internvl_chat") or {}).get("template")
    name = (llm.get("architectures") or [llm.get("model_type")])[0]
    told = f"{name}, {llm.get('num_hidden_layers')} layers of width {llm.get('hidden_size')}"
    return [("language model", told), ("template", template or "not named")]


def table(lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    shown = defaultdict(lambda: " " * width)
    rows = []
    for name, value in lines:
        rows.append(f"{shown.get(name, name.ljust(width))}  {value}")
        shown[name] = " " * width
    return "\n".join(rows)


def _json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _short(number: int) -> str:
    thousands = min((len(str(number)) - 1) // 3, 4)
    return f"{number / 1000**thousands:.3g} {('', 'k', 'M', 'G', 'T')[thousands]}"


if __name__ == "__main__":
    main()
