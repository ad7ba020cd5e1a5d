"""Files of a checkpoint besides weights, config.json and tokenizer: code, licence, preprocessor settings, model card.

Servers and the hub read them. They are read once from the base checkpoint, held in memory, and written into every
folder that a run or a tool makes from it. Code files are plain data here: nothing imports or runs them.
"""

import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from internvl.command_line import CHAT_MODEL_TYPE
from internvl.model.code_files import write_remote_code
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.adapter_checkpoint import is_adapter_checkpoint
from internvl.model.internvl_chat.checkpoint_keys import find_checkpoint_dir
from internvl.model.internvl_chat.safe_loading import MAX_CONFIG_BYTES, iterate_values
from internvl.model.model_card import CARD_FILE, CardFields, read_card_fields, write_model_card
from internvl.regular_files import open_regular_file, read_json_object

logger = logging.getLogger(__name__)
PREPROCESSOR_FILE = "preprocessor_config.json"
PREPROCESSOR_FILES = (PREPROCESSOR_FILE, f"video_{PREPROCESSOR_FILE}", "processor_config.json")
AUTO_MAP_FILES = ("config.json", "tokenizer_config.json", *PREPROCESSOR_FILES)
MAX_FILES, MAX_FILE_BYTES = 64, 2**20  # code files of published models have up to 0.1 MB
# Kind of a file -> pattern of its name. transformers imports code files of the folder itself, none of subfolders.
FILE_KINDS = {
    "code": re.compile(r"(?s).+\.py"),
    "preprocessor": re.compile("|".join(map(re.escape, PREPROCESSOR_FILES))),
    # LICENSE, LICENCE.txt, MODEL_LICENSE, NOTICE, USE_POLICY, ..., but neither weights nor configurations
    "license": re.compile(
        r"(?is)(.*[ _-])?(licen[cs]e|notice|copying|use_policy)(?!.*\.(safetensors|bin|pth?|json|py)$).*"
    ),
    "card": re.compile(re.escape(CARD_FILE)),
}
# `model_type` in config.json -> kinds that fit such a checkpoint. transformers' own class needs no code and has its
# own processor.
FITTING_KINDS = {
    CHAT_MODEL_TYPE: ("code", "preprocessor", "license"),
    "internvl": ("license",),
    "intern_vit_6b": ("preprocessor", "license"),
}
HUB_PATTERNS = ["*.py", "*.json", *("*LICEN*", "*licen*", "*NOTICE*", "*COPYING*", "*USE_POLICY*"), CARD_FILE]
RELATIVE_IMPORT = re.compile(rb"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+))", re.MULTILINE)


@dataclass
class AuxiliaryFiles:
    """Auxiliary files of a checkpoint.

    Args:
        contents: name -> content.
        named_code: more code files, written only if an `auto_map` of the result names them.
        card: what the model card of a result keeps of it.
    """

    contents: dict[str, bytes] = field(default_factory=dict)
    named_code: dict[str, bytes] = field(default_factory=dict)
    card: CardFields = field(default_factory=CardFields)

    def select(self, *kinds: str) -> dict[str, bytes]:
        """Return the files of these kinds."""
        patterns = [FILE_KINDS[kind] for kind in kinds]
        return {name: text for name, text in self.contents.items() if any(p.fullmatch(name) for p in patterns)}

    def remove(self, kind: str) -> dict[str, bytes]:
        """Remove the files of a kind, and return them."""
        return {name: self.contents.pop(name) for name in self.select(kind)}


# -- reading -----------------------------------------------------------------------------------------------------------


def read_auxiliary_files(source: str | Path) -> AuxiliaryFiles:
    """Read the auxiliary files of a checkpoint of unknown origin.

    An adapter checkpoint of an earlier version of this package has none: they are read from its base. Files that cannot
    be carried are logged: irregular and large ones, links out of the folder, missing ones that `auto_map` names.

    Args:
        source: a folder, or ORG/NAME on the hub.
    """
    folder = _find_folder(source)
    files = _read_folder(folder)
    if CARD_FILE not in files.contents and is_adapter_checkpoint(folder):
        base = _read_folder(_find_folder(InternVLChatConfig.from_pretrained(folder).base_model["path"]))
        files = AuxiliaryFiles(base.contents | files.contents, card=base.card)
    if missing := find_missing_code(folder, files.contents):
        logger.warning("%s: auto_map names %s, which is missing: results lack it, too", folder, ", ".join(missing))
    return files


def compose_auxiliary_files(base: AuxiliaryFiles, llm: AuxiliaryFiles) -> AuxiliaryFiles:
    """Join the files of two checkpoints of which a model is composed.

    Args:
        base: of the other parts.
        llm: its code is written where the tokenizer or the LLM's configuration names it.
    """
    contents = base.select("code", "preprocessor", "license")
    for name, content in llm.select("license").items():
        contents[name if contents.get(name, content) == content else f"{name}.language_model"] = content
    is_same_license = base.card.license == llm.card.license
    card = CardFields(
        source=" and ".join(filter(None, (base.card.source, llm.card.source))),
        base_models=list(dict.fromkeys(base.card.base_models + llm.card.base_models)),
        license=base.card.license if is_same_license else {},
    )
    return AuxiliaryFiles(contents, llm.select("code"), card)


def _read_folder(folder: Path) -> AuxiliaryFiles:
    files = AuxiliaryFiles(dict(read_files(folder, FILE_KINDS.values())))
    real_folder = folder.resolve()
    # models--ORG--NAME/snapshots/COMMIT in the hub's cache
    is_cached = real_folder.parent.name == "snapshots" and real_folder.parents[1].name.startswith("models--")
    hub_name = real_folder.parents[1].name.removeprefix("models--").replace("--", "/", 1) if is_cached else None
    files.card = read_card_fields(files.contents.get(CARD_FILE, b""), real_folder.name, hub_name)
    return files


def _find_folder(source: str | Path) -> Path:
    """Return the folder of a checkpoint; on the hub, download its small files."""
    if not Path(source).is_dir():
        try:
            return Path(snapshot_download(str(source), allow_patterns=HUB_PATTERNS))
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            logger.warning("%s: code, licence and model card cannot be downloaded: %s", source, reason)
    return find_checkpoint_dir(source)


def read_files(folder: Path, patterns: Iterable[re.Pattern]) -> Iterator[tuple[str, bytes]]:
    """Read small regular files of a folder, as names and contents."""
    for path in list_inner_files(folder, patterns):
        try:
            with open_regular_file(path, MAX_FILE_BYTES) as file:
                yield path.name, file.read()
        except OSError as error:
            logger.warning("Not copied to results: %s", error)


def list_inner_files(folder: Path, patterns: Iterable[re.Pattern]) -> list[Path]:
    """List the entries of a folder whose names match.

    Links out of the folder are left out, except those of the hub's cache to its own files. What is left out is logged.
    """
    patterns = list(patterns)
    real_folder, paths = Path(os.path.realpath(folder)), []
    roots = [real_folder, *([real_folder.parents[1] / "blobs"] if real_folder.parent.name == "snapshots" else [])]
    for path in sorted(path for path in folder.iterdir() if any(p.fullmatch(path.name) for p in patterns)):
        if not path.name.isprintable():
            reason = "has an unprintable name"
        elif not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
            reason = "is a link that leads out of its folder"
        elif len(paths) == MAX_FILES:
            reason = f"is one of more than {MAX_FILES} files"
        else:
            paths.append(path)
            continue
        logger.warning("Not copied to results: %r %s", str(path), reason)
    return paths


def find_missing_code(folder: Path, contents: Collection[str]) -> list[str]:
    """List the code files that an `auto_map` of the folder names and that are not among `contents`."""
    names = (f"{module}.py" for auto_map in _find_auto_maps(folder) for module in _list_modules(auto_map))
    return sorted({f"{name!r:.80}" for name in names if name not in contents})


# -- preprocessor settings ---------------------------------------------------------------------------------------------


def build_preprocessor_config(tile_size: int, mean: Iterable[float], std: Iterable[float]) -> dict:
    """Build the content of `preprocessor_config.json`, as in published checkpoints."""
    return {
        "crop_size": tile_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": 3,
        "size": tile_size,
    }


def read_normalization(folder: str | Path) -> tuple[list[float], list[float]]:
    """Read mean and standard deviation of the colors from preprocessor settings; default: ImageNet's.

    Raises:
        ValueError: they are no lists of three numbers.
    """
    for file in filter(Path.is_file, (Path(folder) / name for name in PREPROCESSOR_FILES)):
        for _, settings in iterate_values(read_json_object(file, MAX_CONFIG_BYTES), file):
            if isinstance(settings, dict) and {"image_mean", "image_std"} <= settings.keys():
                statistics = settings["image_mean"], settings["image_std"]
                if not all(isinstance(s, list) and len(s) == 3 and all(map(_is_number, s)) for s in statistics):
                    raise ValueError(
                        f"{file} is invalid: image_mean and image_std are {statistics!r:.80}, expected lists of three "
                        "numbers."
                    )
                return statistics
    return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)


def describe_ignored_by_engines(
    config: InternVLChatConfig, folder: str | Path, is_hf_layout: bool = False
) -> str | None:
    """Describe the image settings of a checkpoint that engines ignore.

    vLLM 0.32 hard-codes ImageNet's normalization for the chat layout, and never pads.

    Returns:
        None if there are none.
    """
    ignored, (mean, std) = [], read_normalization(folder)
    if not is_hf_layout and (mean, std) != (list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)):
        ignored.append(
            f"image_mean {mean} and image_std {std} (it takes ImageNet's, except in the layout that "
            "`internvl convert to-hf` writes)"
        )
    if config.pad2square:
        ignored.append("pad2square True (it does not pad)")
    return f"vLLM 0.32 ignores {' and '.join(ignored)}: its answers differ from chat's." if ignored else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def update_preprocessor_config(files: AuxiliaryFiles, fields: dict) -> None:
    """Replace fields of `preprocessor_config.json`, and keep its other ones."""
    config = json.loads(files.contents.get(PREPROCESSOR_FILE, b"{}"))
    files.contents[PREPROCESSOR_FILE] = _format_json(config | fields)


def set_tile_size(files: AuxiliaryFiles, size: int) -> None:
    """Set the side of a tile in pixels in all preprocessor settings.

    A size is an integer, or a dict of them such as `{"height": 448, "width": 448}`.
    """
    for name, content in files.select("preprocessor").items():
        config = json.loads(content)
        for _, value in iterate_values(config, name):
            for key in {"size", "crop_size"} & value.keys() if isinstance(value, dict) else ():
                sides = value[key]
                value[key] = dict.fromkeys(sides, size) if isinstance(sides, dict) else size
        files.contents[name] = _format_json(config)


def _format_json(content: Any) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


# -- writing -----------------------------------------------------------------------------------------------------------


def write_license_files(source: str | Path, folder: str | Path) -> None:
    """Copy the licence files of a checkpoint to a folder that is no checkpoint; existing files are kept."""
    for name, content in read_auxiliary_files(source).select("license").items():
        if not (file := Path(folder) / name).exists():
            file.write_bytes(content)


def write_auxiliary_files(
    files: AuxiliaryFiles, folder: str | Path, made_by: str, with_remote_code: bool = False
) -> None:
    """Write the files that fit a checkpoint, after its config.json and tokenizer.

    An `auto_map` keeps the entries whose code files are there, and those that name a repository on the hub.

    Args:
        made_by: "fine-tuning", or the name of a tool, for the model card.
        with_remote_code: write code files of this package if the source has none.
    """
    folder = Path(folder)
    kinds = FITTING_KINDS[read_json_object(folder / "config.json", MAX_CONFIG_BYTES)["model_type"]]
    _write(folder, files.select(*kinds))
    _write(folder, _select_named_code(folder, files.named_code | files.select("code")))
    remove_dangling_auto_maps(folder)
    if with_remote_code:
        write_remote_code(folder)
    write_model_card(folder, read_json_object(folder / "config.json", MAX_CONFIG_BYTES), files.card, made_by)


def _write(folder: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def _select_named_code(folder: Path, code: dict[str, bytes]) -> dict[str, bytes]:
    """Select code files that an `auto_map` names, and the files that these import."""
    pending = [module for auto_map in _find_auto_maps(folder) for module in _list_modules(auto_map)]
    selected = {}
    while pending:
        name = f"{pending.pop()}.py"
        if name in code and name not in selected:
            selected[name] = code[name]
            pending += [(a or b).decode() for a, b in RELATIVE_IMPORT.findall(code[name])]
    return selected


def remove_dangling_auto_maps(folder: Path) -> None:
    """Remove the entries of `auto_map` whose code files are missing."""
    for file in filter(Path.is_file, (folder / name for name in AUTO_MAP_FILES)):
        content, is_changed = read_json_object(file, MAX_CONFIG_BYTES), False
        for _, owner in iterate_values(content, file):
            if isinstance(owner, dict) and "auto_map" in owner:
                auto_map = owner.pop("auto_map")
                if kept := _keep_available(auto_map, folder):
                    owner["auto_map"] = kept
                is_changed |= kept != auto_map or not kept
        if is_changed:
            file.write_bytes(_format_json(content))


def _keep_available(auto_map: Any, folder: Path) -> Any:
    """Return the part of an `auto_map` whose code is available; None or an empty dict if there is none."""
    if isinstance(auto_map, dict):
        kept = {name: _keep_available(reference, folder) for name, reference in auto_map.items()}
        return {name: reference for name, reference in kept.items() if reference}
    if isinstance(auto_map, list):  # of a slow and a fast tokenizer, either may be None
        kept = [_keep_available(reference, folder) for reference in auto_map]
        return kept if any(kept) else None
    is_available = all((folder / f"{module}.py").is_file() for module in _list_modules(auto_map))
    return auto_map if isinstance(auto_map, str) and is_available else None


def _find_auto_maps(folder: Path) -> Iterator[Any]:
    """Yield each `auto_map` in a folder's configurations."""
    for file in filter(Path.is_file, (folder / name for name in AUTO_MAP_FILES)):
        for _, owner in iterate_values(read_json_object(file, MAX_CONFIG_BYTES), file):
            if isinstance(owner, dict) and "auto_map" in owner:
                yield owner["auto_map"]


def _list_modules(auto_map: Any) -> list[str]:
    """List the modules of the folder that an `auto_map` names (`module.Class`).

    A reference `ORG/NAME--module.Class` is to the hub.
    """
    references = [value for _, value in iterate_values(auto_map, "auto_map") if isinstance(value, str)]
    return [reference.partition(".")[0] for reference in references if "--" not in reference]
