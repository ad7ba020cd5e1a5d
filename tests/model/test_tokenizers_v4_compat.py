"""Saved tokenizers load here and have the files that transformers 4 reads."""

import json
import shutil

import pytest
import transformers
from helpers.tokenizer_cases import assert_equals_recorded

from internvl.model.tokenizers.loading import load_tokenizer

# Class in tokenizer_config.json -> the saved class, and the files that this class of transformers 4 reads.
CLASSES = {
    "PreTrainedTokenizerFast": ("PreTrainedTokenizerFast", {"tokenizer.json"}),
    "TokenizersBackend": ("PreTrainedTokenizerFast", {"tokenizer.json"}),
    "LlamaTokenizerFast": ("PreTrainedTokenizerFast", {"tokenizer.json"}),  # whose tokenizer.json is not Llama's
    "Qwen2Tokenizer": ("Qwen2Tokenizer", {"vocab.json", "merges.txt"}),
    "Qwen2TokenizerFast": ("Qwen2Tokenizer", {"vocab.json", "merges.txt"}),
}


@pytest.fixture(params=CLASSES)
def folder(goldens, tmp_path, request):
    """Copy the recorded tokenizer with another `tokenizer_class`."""
    folder = shutil.copytree(goldens / "tokenizer", tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": request.param}))
    return folder


def test_save_and_reload(goldens, folder, tmp_path):
    saved = tmp_path / "saved"
    load_tokenizer(folder).save_pretrained(saved)
    before, after = (json.loads((f / "tokenizer_config.json").read_text()) for f in (folder, saved))
    name, files = CLASSES[before["tokenizer_class"]]
    assert after["tokenizer_class"] == name
    assert files <= {file.name for file in saved.iterdir()}
    for field in ("added_tokens_decoder", "additional_special_tokens", "eos_token", "pad_token"):
        assert after[field] == before[field]
    for tokenizer in (load_tokenizer(saved), getattr(transformers, name).from_pretrained(saved)):
        assert_equals_recorded(tokenizer, goldens / "tokenizer")


def test_merges_are_saved_in_the_format_of_transformers_4(goldens, folder, tmp_path):
    load_tokenizer(folder).save_pretrained(tmp_path)
    before, after = (json.loads((f / "tokenizer.json").read_text()) for f in (goldens / "tokenizer", tmp_path))
    assert after["model"]["merges"] == before["model"]["merges"]
    assert isinstance(after["model"]["merges"][0], str)


@pytest.mark.parametrize("folder", ["Qwen2Tokenizer", "Qwen2TokenizerFast"], indirect=True)
def test_vocabulary_files_are_sufficient(goldens, folder):
    """Published Qwen2 checkpoints, saved by the slow class, have no tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"]]), encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    assert_equals_recorded(load_tokenizer(folder), goldens / "tokenizer")
