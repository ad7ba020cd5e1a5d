"""Llama's sentencepiece tokenizer (`legacy: false`) equals the slow class of transformers 4."""

import json
import pickle
import random

import pytest
import sentencepiece
from helpers.tokenizer_cases import assert_equals_recorded, load_encodings

from internvl.model.tokenizers.llama import LlamaTokenizer
from internvl.model.tokenizers.loading import load_tokenizer

NAME = "tokenizer_phi3"


@pytest.fixture(scope="module")
def tokenizer(goldens):
    tokenizer = load_tokenizer(goldens / NAME)
    assert type(tokenizer) is LlamaTokenizer
    return tokenizer


def test_equals_sentencepiece(goldens, tokenizer):
    """Compare random texts with known and unknown characters and spaces anywhere."""
    original = sentencepiece.SentencePieceProcessor(model_file=str(goldens / NAME / "tokenizer.model"))
    pieces = [original.id_to_piece(i).replace("▁", " ") for i in range(3, len(original)) if not original.is_byte(i)]
    generator = random.Random(0)
    for _ in range(500):
        text = "".join(generator.choices([*pieces, " ", "  ", "\n", "é", "🙂"], k=generator.randint(1, 20)))
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == original.encode(text), text
        assert tokenizer.decode(ids) == text


def test_offsets_refer_to_the_text(goldens, tokenizer):
    """Offsets delimit each piece in the text; the added "▁" is empty."""
    texts = [row["text"] for row in load_encodings(goldens / NAME)]
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    batch = tokenizer(texts, **options)
    for text, ids, offsets in zip(texts, batch.input_ids, batch.offset_mapping, strict=True):
        alone = tokenizer(text, **options)
        assert (alone.input_ids, alone.offset_mapping) == (ids, offsets)
        for token, (start, end) in zip(tokenizer.convert_ids_to_tokens(ids), offsets, strict=True):
            if not (token.startswith("<") and token.endswith(">")):
                assert text[start:end].replace(" ", "▁").removeprefix("▁") == token.removeprefix("▁"), text


def test_save_and_reload(goldens, tokenizer, tmp_path):
    """A published `tokenizer.json` that splits texts differently is ignored."""
    saved = load_tokenizer(goldens / NAME)
    saved.add_tokens(["<extra>"], special_tokens=True)
    saved.save_pretrained(tmp_path)
    pipeline = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    pipeline |= {"normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}, "pre_tokenizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    for reloaded in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(saved))):
        assert type(reloaded) is LlamaTokenizer
        assert reloaded.get_vocab() == saved.get_vocab() != tokenizer.get_vocab()
        assert reloaded("a<extra>").input_ids == [*tokenizer("a").input_ids, len(tokenizer)]
        assert_equals_recorded(reloaded, goldens / NAME)


def test_fields_for_transformers_4_are_saved(goldens, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    saved, original = (json.loads((f / "tokenizer_config.json").read_text()) for f in (tmp_path, goldens / NAME))
    assert (tmp_path / "tokenizer.model").read_bytes() == (goldens / NAME / "tokenizer.model").read_bytes()
    assert saved["added_tokens_decoder"] == original["added_tokens_decoder"]
    names = ("tokenizer_class", "legacy", "bos_token", "eos_token", "pad_token", "unk_token")
    assert {name: saved[name] for name in names} == {name: original[name] for name in names}


def test_pairs_and_words_are_not_supported(tokenizer):
    with pytest.raises(ValueError, match="neither words nor pairs"):
        tokenizer("a", "b")
    with pytest.raises(ValueError, match="neither words nor pairs"):
        tokenizer(["a", "b"], is_split_into_words=True)
