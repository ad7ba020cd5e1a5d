"""Saved tokenizers load again, here and in transformers 4, whose slow classes read other files."""

import json
import shutil

import pytest
import transformers
from model.test_tokenization_internlm2 import assert_recorded

from internvl.model.tokenizers.loading import load_tokenizer

# Class in tokenizer_config.json: what it becomes, and what its class in transformers 4 reads beside the configuration.
CLASSES = {
    "PreTrainedTokenizerFast": ("PreTrainedTokenizerFast", {"tokenizer.json"}),
    "TokenizersBackend": ("PreTrainedTokenizerFast", {"tokenizer.json"}),
    "Qwen2Tokenizer": ("Qwen2Tokenizer", {"vocab.json", "merges.txt"}),
    "Qwen2TokenizerFast": ("Qwen2Tokenizer", {"vocab.json", "merges.txt"}),
}


@pytest.fixture(params=CLASSES)
def folder(goldens, tmp_path, request):
    """The recorded tokenizer as one of this class."""
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
        assert_recorded(tokenizer, goldens / "tokenizer")


def test_merges_are_spelled_as_before(goldens, folder, tmp_path):
    load_tokenizer(folder).save_pretrained(tmp_path)
    before, after = (json.loads((f / "tokenizer.json").read_text()) for f in (goldens / "tokenizer", tmp_path))
    assert after["model"]["merges"] == before["model"]["merges"]
    assert isinstance(after["model"]["merges"][0], str)


@pytest.mark.parametrize("folder", ["Qwen2Tokenizer", "Qwen2TokenizerFast"], indirect=True)
def test_vocabulary_files_are_enough(goldens, folder):
    """Published Qwen2 checkpoints were saved by the slow class: no tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"]]), encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    assert_recorded(load_tokenizer(folder), goldens / "tokenizer")
