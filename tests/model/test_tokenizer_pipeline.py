"""Tokenizers of unknown origin: bombs, slow patterns, panics of the library, odd values."""

import base64
import json
import shutil
import time
from pathlib import Path

import pytest

from internvl.constants import get_pad_id
from internvl.model.compose import add_special_tokens
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.slow_patterns import is_slow_pattern
from internvl.model.tokenizers.loading import load_tokenizer

NOTHING_REPEATED = [  # of GPT-2, Qwen2, GPT-OSS, DeepSeek-V3, and others
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}]+[\r\n/]*|\s+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*""",
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}&&[^\p{Han}]]+(?i:'s|'t)?|\p{N}{1,3}",
    r" ?[^(\s|[.,!?…])]+",
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    r"^(?!.*visual).*(?:q_proj|k_proj).*",
]
SLOW_PATTERNS = [r"(a+)+$", r"(?:a+)+b", r"(a*)*b", r"(x+x+)+y", r"(?:(?:a|a)+)+b", r"(a|aa)+$", r"(a{1,}){5,}"]
SLOW_PATTERNS += [r"((a+))+b", r"(?<x>a+)+", r"(\w+\s?)*$", "(a+){2,3}", "a" * 5000, r"\s*" * 7]


@pytest.mark.parametrize("pattern", NOTHING_REPEATED)
def test_patterns_in_use_are_not_slow(pattern):
    assert not is_slow_pattern(pattern)


@pytest.mark.parametrize("pattern", SLOW_PATTERNS)
def test_slow_patterns_are_found(pattern):
    assert is_slow_pattern(pattern)


@pytest.fixture
def folder(goldens, tmp_path) -> Path:
    """Copy a tokenizer; the test may change it."""
    return Path(shutil.copytree(goldens / "tokenizer", tmp_path / "tokenizer"))


def edit_json(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def repeat_replacement(num: int, content: str = "aa") -> dict:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [step] * num}]}


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": []}
PADDING = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
# a trie of 4 bytes, which are preceded by their number, and a replacement
CHARSMAP = base64.b64encode(b"\4\0\0\0" + bytes(4) + b"a" * 999 + b"\0").decode()
UNSAFE_PIPELINES = {
    "replacements": ({"normalizer": repeat_replacement(30)}, "normalizer may multiply the length of a text by 1,073"),
    "one long replacement": ({"normalizer": repeat_replacement(1, "a" * 999)}, "normalizer may multiply .* by 999"),
    "decoder": ({"decoder": {"type": "Sequence", "decoders": [repeat_replacement(9)]}}, "decoder may multiply"),
    "regular expression": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "b" * 99}},
        "normalizer may multiply the length of a text by 100",
    ),
    "charsmap": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}},
        "normalizer may multiply",
    ),
    "slow pattern": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a+)+$"}}}, "Regex .*may take very long"),
    "padding": ({"padding": {**PADDING, "pad_type_id": 0, "pad_token": "a"}}, "padding.strategy.Fixed 1000000000"),
    "template": (
        {"post_processor": {**TEMPLATE, "special_tokens": {"a": {"id": "a", "ids": [1] * 999, "tokens": ["a"] * 999}}}},
        "post_processor adds 1,000 tokens",
    ),
    "nesting": ({"normalizer": {"a": json.loads("[" * 99 + "]" * 99)}}, "nested deeper than 32"),
    "no model": ({"model": []}, "expected an object `model`"),
    "invalid pattern": ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "("}}}, "cannot be loaded: Exception"),
    "empty pattern": (
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "b"}},
        "normalizer may multiply",
    ),
    # The library panics on these when it encodes a text.
    "panic of a length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "PanicException"),
    "panic of a template": (
        {"post_processor": {**TEMPLATE, "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "special_tokens": {}}},
        "PanicException|cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", UNSAFE_PIPELINES)
def test_unsafe_pipeline_is_refused(folder, name):
    fields, message = UNSAFE_PIPELINES[name]
    edit_json(folder / "tokenizer.json", **fields)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(folder)
    assert time.monotonic() - start < 5
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


UNSAFE_MODELS = {
    "id": ({"vocab": {"a": 10**9}, "merges": []}, "id 1000000000 of token 'a' is invalid"),
    "dropout": ({"dropout": 0.1}, "model.dropout 0.1 is not supported"),
    "prefix": ({"continuing_subword_prefix": "b"}, "does not begin each merged piece"),
    "long prefix": ({"end_of_word_suffix": "b" * 9999}, "longer than 64 characters"),
}


@pytest.mark.parametrize("name", UNSAFE_MODELS)
def test_unsafe_model_is_refused(folder, name):
    fields, message = UNSAFE_MODELS[name]
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    edit_json(folder / "tokenizer.json", model=model | fields)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


UNSAFE_CONFIGS = {
    "gguf_file": "../model.gguf",
    "fast_tokenizer_files": ["tokenizer.4.0.json"],
    "init_inputs": ["/etc/passwd"],
    "vocab": "/etc/passwd",
    "tokenizer_class": ["a"],
    "attn_implementation": {"": "org/kernel"},
    "added_tokens_decoder": {"1000000000": {"content": "a"}},
}


@pytest.mark.parametrize("key", UNSAFE_CONFIGS)
def test_unsafe_configuration_is_refused(folder, key):
    edit_json(folder / "tokenizer_config.json", **{key: UNSAFE_CONFIGS[key]})
    with pytest.raises(ValueError, match=f"tokenizer_config.json.*{key}|id 1000000000 of token"):
        load_tokenizer(folder)


def test_ids_beyond_the_embedding_are_named(folder, goldens):
    pipeline = json.loads((folder / "tokenizer.json").read_text())
    pipeline["model"]["vocab"]["beyond"] = 4000
    edit_json(folder / "tokenizer.json", model=pipeline["model"])
    model = InternVLChatModel.from_pretrained(goldens / "e2e/qwen2")
    with pytest.raises(ValueError, match="token 'beyond' has the id 4000, and the embedding has 1009 rows"):
        add_special_tokens(model, load_tokenizer(folder), ["<img>"])


def test_tokenizer_without_pad_token_pads_with_the_end_of_text(folder, goldens):
    """Upstream pads with 0. Padding is masked."""
    expected = load_tokenizer(goldens / "tokenizer")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(folder / name, pad_token=None)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == tokenizer.eos_token and len(tokenizer) == len(expected)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(folder / name, eos_token=None)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id is None and get_pad_id(tokenizer) == 0
    tokenizer.save_pretrained(folder.parent / "saved")
    for loaded in (tokenizer, load_tokenizer(folder.parent / "saved")):
        assert loaded("What?").input_ids == expected("What?").input_ids
        assert loaded.decode([0], skip_special_tokens=True) == "!"
