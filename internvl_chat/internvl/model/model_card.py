"""The model card (README.md) of a result: what the hub reads, how it was made, how to open it."""

import re
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from internvl.command_line import CHAT_MODEL_TYPE

CARD_FILE = "README.md"
MAX_FRONT_MATTER_BYTES, MAX_BASE_MODELS = 2**16, 8
LICENSE_FIELDS = ("license", "license_name", "license_link")
CARD_FIELD = re.compile(r"(\w+):\s*(.*)")
LIST_ITEM = re.compile(r"\s*-\s+(.*)")
PLAIN_VALUE = re.compile(r"[\w.+/:@?=~-][\w.+/:@?=~ -]{0,199}")
HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


@dataclass
class CardFields:
    """What a result's card takes over from its base.

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
CHAT_TASK = "image-text-to-text"
LAYOUTS = {
    "adapters": Layout(
        "peft",
        CHAT_TASK,
        ("lora",),
        "It holds the trained weights only, adapters in PEFT's format. Opening it requires the base model, whose path "
        "is `base_model` in config.json. `tools/merge_lora.py` makes a complete model of both.",
        OPEN_CHAT_MODEL,
    ),
    "chat": Layout("transformers", CHAT_TASK, (), "A complete model in InternVL's own layout.", OPEN_CHAT_MODEL),
    "chat with code": Layout(
        "transformers",
        CHAT_TASK,
        ("custom_code",),
        "A complete model in InternVL's own layout, with the code that opens it.",
        "from transformers import AutoModel, AutoTokenizer\n\n"
        "model = AutoModel.from_pretrained({name!r}, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained({name!r}, trust_remote_code=True)",
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

    Strings and lists of strings are read line by line, everything else is ignored. A YAML parser would follow aliases,
    with which a few lines stand for gigabytes.

    Args:
        source: name of the model's folder.
        hub_name: of the model on the hub, if known.
    """
    lines = content[:MAX_FRONT_MATTER_BYTES].decode("utf-8-sig", "replace").splitlines()
    values: dict[str, list[str]] = {}
    key = ""
    if lines and lines[0].rstrip() == "---":
        for line in takewhile(lambda line: line.rstrip() != "---", lines[1:]):
            if match := CARD_FIELD.fullmatch(line):
                key, text = match.groups()
                values[key] = _parse_plain_values(text.strip("[]").split(","))
            elif match := LIST_ITEM.fullmatch(line):
                values.setdefault(key, []).extend(_parse_plain_values([match[1]]))
    base_models = [hub_name] if hub_name else list(filter(HUB_NAME.fullmatch, values.get("base_model", [])))
    return CardFields(
        source=hub_name or (source if PLAIN_VALUE.fullmatch(source) else "another checkpoint"),
        base_models=base_models[:MAX_BASE_MODELS],
        license={name: found if found[1:] else found[0] for name in LICENSE_FIELDS if (found := values.get(name))},
    )


def _parse_plain_values(texts: list[str]) -> list[str]:
    stripped = (text.partition(" #")[0].strip().strip("'\"").strip() for text in texts)
    return list(filter(PLAIN_VALUE.fullmatch, stripped))


def write_model_card(folder: Path, config: dict, fields: CardFields, made_by: str) -> None:
    """Write the card of a result, unless the folder has one.

    Args:
        config: content of the folder's config.json.
        made_by: "fine-tuning", or the name of a tool.
    """
    if (folder / CARD_FILE).exists():  # may be the user's
        return
    layout = LAYOUTS[find_layout(config)]
    data = ModelCardData(
        base_model=fields.base_models or None,
        library_name=layout.library,
        pipeline_tag=layout.task,
        tags=["internvl", *layout.tags],
        **fields.license,
    )
    name = folder.resolve().name
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nMade from `{fields.source}` by {made_by}. {layout.description}\n\n"
        f"```python\n{layout.example.format(name=name)}\n```\n"
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def find_layout(config: dict) -> str:
    """Return the layout of a checkpoint by its config.json, a key of `LAYOUTS`."""
    if config["model_type"] != CHAT_MODEL_TYPE:
        return "hf" if config["model_type"] == "internvl" else "vision encoder"
    if config.get("base_model"):
        return "adapters"
    return "chat with code" if "AutoModel" in (config.get("auto_map") or {}) else "chat"
