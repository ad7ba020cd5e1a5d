"""Saving tokenizers for transformers 4 as well as 5.

Upstream and the model cards load the slow classes of version 4 (`use_fast=False`). Version 5 omits fields of
`tokenizer_config.json` that these read, writes class names that version 4 does not have, and stores merges in a form
that its `tokenizers` library does not parse.
"""

import json
from pathlib import Path


class Transformers4SavingMixin:
    """Mixin for tokenizers of transformers 5 that both versions load.

    The saved class name is the subclass's, which must be a class of transformers 4.
    """

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        add_v4_config_fields(self, file_names[0], tokenizer_class=type(self).__name__)
        # pyrefly: ignore[missing-attribute]  # of the tokenizer class beside this mixin
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        convert_merges_to_v4(Path(files[-1]))
        return (*files, *self._save_slow_tokenizer_files(save_directory))

    def _save_slow_tokenizer_files(self, folder) -> list[str]:
        """Save files that only a slow class reads; return their paths."""
        return []


def add_v4_config_fields(tokenizer, config_path, **fields) -> None:
    """Add the list of added tokens and `fields` to a tokenizer_config.json."""
    added_tokens = {
        token_id: token.__getstate__() for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    # transformers 5 renamed `additional_special_tokens` to `extra_special_tokens`.
    special_tokens = [str(token) for token in tokenizer.extra_special_tokens]
    fields |= {"added_tokens_decoder": added_tokens, "additional_special_tokens": special_tokens}
    update_json(config_path, **fields, extra_special_tokens=None)


def update_json(path, **fields) -> None:
    """Set fields of the JSON object in a file; None removes one."""
    updated = json.loads(Path(path).read_text(encoding="utf-8")) | fields
    kept = {name: value for name, value in updated.items() if name not in fields or value is not None}
    Path(path).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert_merges_to_v4(tokenizer_path: Path) -> None:
    """Rewrite the merges in a tokenizer.json, if there is one: ["a", "b"] -> "a b".

    The file stays unchanged if a piece contains a space, which would be ambiguous.
    """
    if not tokenizer_path.is_file():
        return
    pipeline = json.loads(tokenizer_path.read_text(encoding="utf-8"))
    merges = pipeline["model"].get("merges")
    if not merges or any(isinstance(merge, str) or " " in "".join(merge) for merge in merges):
        return
    pipeline["model"]["merges"] = [" ".join(merge) for merge in merges]
    tokenizer_path.write_text(json.dumps(pipeline, indent=2, ensure_ascii=False), encoding="utf-8")
