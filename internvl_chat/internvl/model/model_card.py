"""The model card (README.md) of a result: what the hub reads, how it was made, how to open it."""

import logging
import re
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCardData

from internvl import __version__
from internvl.command_line import CHAT_MODEL_TYPE
from internvl.regular_files import open_regular_file

logger = logging.getLogger(__name__)
CARD_FILE = "README.md"
MAX_FRONT_MATTER_BYTES, MAX_CARD_BYTES, MAX_VALUE_LENGTH, MAX_BASE_MODELS = 2**16, 2**20, 200, 8
LICENSE_FIELDS = ("license", "license_name", "license_link")
YAML_NULLS = ("", "~", "null", "Null", "NULL")
HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
# The sentence that `_format_card` writes.
ORIGIN = re.compile(r"^# (.+)\n\nMade from `([^`\n]+)` by ([^\n]+?)\. ", re.MULTILINE)


@dataclass
class CardFields:
    """What a result's card keeps of its base's.

    Args:
        source: name of the base for a sentence.
        base_models: names on the hub.
        license: those of `LICENSE_FIELDS` that the base's card has; texts or lists of texts.
    """

    source: str = ""
    base_models: list[str] = field(default_factory=list)
    license: dict[str, Any] = field(default_factory=dict)


class Layout(NamedTuple):
    """Text of the card for one layout of a checkpoint."""

    library: str
    task: str
    tags: tuple[str, ...]
    description: str
    example: str


OPEN_CHAT_MODEL = """\
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer

model = InternVLChatModel.from_pretrained({name!r})
tokenizer = load_tokenizer({name!r})"""
OPEN_WITH_CODE = """\
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained({name!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({name!r}, trust_remote_code=True)"""
CHAT_TASK = "image-text-to-text"
LAYOUTS = {
    "adapters": Layout(
        "peft",
        CHAT_TASK,
        ("lora",),
        "It holds the trained weights only, adapters in PEFT's format. Opening it requires the base model, whose path "
        "is `base_model` in config.json. `internvl merge` makes a complete model of both.",
        OPEN_CHAT_MODEL,
    ),
    "chat": Layout("transformers", CHAT_TASK, (), "A complete model in InternVL's own layout.", OPEN_CHAT_MODEL),
    "chat with code": Layout(
        "transformers",
        CHAT_TASK,
        ("custom_code",),
        "A complete model in InternVL's own layout, with the code that opens it.",
        OPEN_WITH_CODE,
    ),
    "chat with code on the hub": Layout(
        "transformers",
        CHAT_TASK,
        ("custom_code",),
        "A complete model in InternVL's own layout, with code from {repository}, which transformers downloads.",
        OPEN_WITH_CODE,
    ),
    "hf": Layout(
        "transformers",
        CHAT_TASK,
        (),
        "A complete model for transformers' own class `InternVLForConditionalGeneration`.",
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        "model = AutoModelForImageTextToText.from_pretrained({name!r})\n"
        "processor = AutoProcessor.from_pretrained({name!r})",
    ),
    "vision encoder": Layout(
        "transformers",
        "image-feature-extraction",
        (),
        "The vision encoder of an InternVL model.",
        "from internvl.model.internvl_chat import InternVisionModel\n\n"
        "model = InternVisionModel.from_pretrained({name!r})",
    ),
}


def read_card_fields(content: bytes, source: str, hub_name: str | None = None) -> CardFields:
    """Read licence and base models from the front matter of an untrusted card.

    Strings and lists of strings count, everything else is ignored. YAML's `BaseLoader` follows no tags and merges no
    aliases, with which a few lines stand for gigabytes.

    Args:
        source: name of the model's folder.
        hub_name: of the model on the hub, if known.
    """
    lines = content[:MAX_FRONT_MATTER_BYTES].decode("utf-8-sig", "replace").splitlines()
    has_fields = bool(lines) and lines[0].rstrip() == "---"
    front_matter = takewhile(lambda line: line.rstrip() not in ("---", "..."), lines[1:] if has_fields else [])
    try:
        fields = yaml.load("\n".join(front_matter), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        logger.warning("The model card of %s is invalid, results lack its licence: %.80s", source, error)
        fields = None
    values = {name: _list_texts(value) for name, value in fields.items()} if isinstance(fields, dict) else {}
    base_models = [hub_name] if hub_name else list(filter(HUB_NAME.fullmatch, values.get("base_model", [])))
    return CardFields(
        source=hub_name or (source if _is_short_text(source) else "another checkpoint"),
        base_models=base_models[:MAX_BASE_MODELS],
        license={name: found if found[1:] else found[0] for name in LICENSE_FIELDS if (found := values.get(name))},
    )


def _list_texts(value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    return [text for text in texts if isinstance(text, str) and text not in YAML_NULLS and _is_short_text(text)]


def _is_short_text(text: str) -> bool:
    return 0 < len(text) <= MAX_VALUE_LENGTH and text.isprintable() and "`" not in text


def write_model_card(folder: Path, config: dict, fields: CardFields, made_by: str) -> None:
    """Write the card of a result, unless the folder has one.

    Args:
        config: content of the folder's config.json.
        made_by: "fine-tuning", or the name of a tool.
    """
    if not (folder / CARD_FILE).exists():  # may be the user's
        made_by = f"{made_by} (internvl {__version__})"
        text = _format_card(folder.resolve().name, config, fields, made_by)
        (folder / CARD_FILE).write_text(text, encoding="utf-8")


def update_model_card(folder: Path, old_config: dict, config: dict) -> None:
    """Rewrite a card for a new config.json, if `write_model_card` wrote it for the old one and nobody changed it."""
    file = folder / CARD_FILE
    if not file.is_file():
        return
    with open_regular_file(file, MAX_CARD_BYTES) as opened:
        content = opened.read()
    if origin := ORIGIN.search(content.decode("utf-8", "replace")):
        name, source, made_by = origin.groups()
        fields = replace(read_card_fields(content, source), source=source)
        if content.decode("utf-8", "replace") == _format_card(name, old_config, fields, made_by):
            file.write_text(_format_card(name, config, fields, made_by), encoding="utf-8")


def _format_card(name: str, config: dict, fields: CardFields, made_by: str) -> str:
    layout = LAYOUTS[find_layout(config)]
    data = ModelCardData(
        base_model=fields.base_models or None,
        library_name=layout.library,
        pipeline_tag=layout.task,
        tags=["internvl", *layout.tags],
        **fields.license,
    )
    description = layout.description.format(repository=_find_model_repository(config))
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nMade from `{fields.source}` by {made_by}. {description}\n\n"
        f"```python\n{layout.example.format(name=name)}\n```\n"
    )


def find_layout(config: dict) -> str:
    """Return the layout of a checkpoint by its config.json, a key of `LAYOUTS`."""
    if config["model_type"] != CHAT_MODEL_TYPE:
        return "hf" if config["model_type"] == "internvl" else "vision encoder"
    if config.get("base_model"):
        return "adapters"
    if "AutoModel" not in (config.get("auto_map") or {}):
        return "chat"
    return "chat with code on the hub" if _find_model_repository(config) else "chat with code"


def _find_model_repository(config: dict) -> str | None:
    auto_map = config.get("auto_map")
    return find_repository(auto_map.get("AutoModel")) if isinstance(auto_map, dict) else None


def find_repository(reference: Any) -> str | None:
    """Return the repository that an entry of `auto_map` names, if it names one.

    A reference is `module.Class`, a file in the folder, or `ORG/NAME--module.Class`, one on the hub.
    """
    repository, separator, _ = str(reference).partition("--")
    return (repository if HUB_NAME.fullmatch(repository) else "another repository") if separator else None
