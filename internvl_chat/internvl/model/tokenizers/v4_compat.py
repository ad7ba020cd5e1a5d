"""Tokenizers saved so that transformers 4 loads them, too, as upstream and the model cards do (`use_fast=False`).

Version 5 leaves out of `tokenizer_config.json` what the slow classes of version 4 read, writes class names that version
4 does not know, and merges in a form that its `tokenizers` do not.
"""

import json
from pathlib import Path


class SavedForTransformers4:
    """Goes before a class of transformers 5 and gives its name to the saved tokenizer, for either version to load."""

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        complete_config(self, file_names[0], tokenizer_class=type(self).__name__)
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        _spell_merges_as_before(Path(files[-1]))
        return (*files, *self._save_slow_files(save_directory))

    def _save_slow_files(self, folder) -> list[str]:
        """Writes what only a slow class reads."""
        return []


def complete_config(tokenizer, file, **fields) -> None:
    """Adds the list of added tokens and these fields to a saved `tokenizer_config.json`."""
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {
        index: token.__getstate__() for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    config["additional_special_tokens"] = [str(token) for token in config.pop("extra_special_tokens", [])]
    Path(file).write_text(json.dumps(config | fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _spell_merges_as_before(file: Path) -> None:
    """In `tokenizer.json`: "a b" instead of ["a", "b"], unless a space in a piece makes that ambiguous."""
    pipeline = json.loads(file.read_text(encoding="utf-8"))
    merges = pipeline["model"].get("merges")
    if not merges or any(isinstance(merge, str) or " " in "".join(merge) for merge in merges):
        return
    pipeline["model"]["merges"] = [" ".join(merge) for merge in merges]
    file.write_text(json.dumps(pipeline, indent=2, ensure_ascii=False), encoding="utf-8")
