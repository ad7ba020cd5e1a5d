"""A base checkpoint's files besides weights, configuration and tokenizer."""

import json
from pathlib import Path

GENERATION_CONFIG = {
    "eos_token_id": [2, 998],
    "pad_token_id": 5,
    "do_sample": True,
    "temperature": 0.7,
    "repetition_penalty": 1.05,
    "unknown_setting": 3,
}
# In a result, the end mark of the template internvl2_5 is added.
SAVED_GENERATION_CONFIG = GENERATION_CONFIG | {"eos_token_id": [2, 998, 999]}
PREPROCESSOR_CONFIG = {
    "size": {"height": 56, "width": 56},
    "crop_size": 56,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "unknown_setting": 1,
}
CARD = """\
---
license: other
license_name: qwen
license_link: LICENSE  # beside this file
base_model:
  - OpenGVLab/InternViT-300M-448px
  - "Qwen/Qwen2.5-0.5B"
---
# The base
"""
# Code of a configuration that AutoConfig can load, in two files.
CONFIGURATION = """\
from transformers import PretrainedConfig

from .model_types import CHAT


class InternVLChatConfig(PretrainedConfig):
    model_type = CHAT
"""
CODE_FILES = {
    "configuration_internvl_chat.py": CONFIGURATION,
    "model_types.py": 'CHAT = "internvl_chat"\n',
    "modeling_internvl_chat.py": "raise SystemExit('run')\n",
    "handler.py": "raise SystemExit('run')\n",
}
AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "OpenGVLab/InternVL--modeling_internvl_chat.InternVLChatModel",
}


def edit_json(file: Path, **fields) -> None:
    """Set fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def add_base_files(folder: Path) -> None:
    """Add code, licence, card and settings to a chat checkpoint, as published ones have them."""
    files = CODE_FILES | {"LICENSE": "the licence", "NOTICE.txt": "a notice", "README.md": CARD}
    files["generation_config.json"] = json.dumps(GENERATION_CONFIG)
    files["preprocessor_config.json"] = json.dumps(PREPROCESSOR_CONFIG)
    for name, text in files.items():
        (folder / name).write_text(text)
    edit_json(folder / "config.json", auto_map=AUTO_MAP)


def read_generation_config(folder: Path) -> dict:
    """Read `generation_config.json` without the version of the library that wrote it."""
    config = json.loads((folder / "generation_config.json").read_text())
    config.pop("transformers_version", None)
    return config
