"""The InternLM2 tokenizer equals the recorded results and sentencepiece, also after saving."""

import json
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import sentencepiece
from helpers.paths import PACKAGE_DIR
from helpers.tokenizer_cases import assert_equals_recorded, load_encodings
from transformers import AutoTokenizer

from internvl.model.internlm2.tokenization_internlm2 import InternLM2Tokenizer
from internvl.model.internlm2.tokenization_internlm2_fast import InternLM2TokenizerFast
from internvl.model.tokenizers.loading import load_tokenizer

INTERNLM2 = ["tokenizer_internlm2", "tokenizer_internlm2_prefix"]
FOLDERS = ["tokenizer", "tokenizer_phi3", "tokenizer_phi3_fast", *INTERNLM2]


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_texts_equal_the_recorded_ones(goldens, name):
    assert_equals_recorded(load_tokenizer(goldens / name), goldens / name)


@pytest.mark.parametrize("name", INTERNLM2)
@pytest.mark.parametrize("load", [load_tokenizer, AutoTokenizer.from_pretrained, InternLM2Tokenizer.from_pretrained])
def test_auto_map_is_ignored(goldens, tmp_path, name, load):
    """`auto_map` names a file that does not exist: running it would fail."""
    shutil.copytree(goldens / name, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.saved_by_upstream.json").replace(tmp_path / "tokenizer_config.json")
    tokenizer = load(tmp_path)
    assert type(tokenizer) is InternLM2Tokenizer
    assert_equals_recorded(tokenizer, goldens / name)


@pytest.mark.parametrize("name", INTERNLM2)
def test_equals_sentencepiece(goldens, name):
    """Compare texts of one piece, and random texts."""
    original = sentencepiece.SentencePieceProcessor(model_file=str(goldens / name / "tokenizer.model"))
    tokenizer = load_tokenizer(goldens / name)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = [original.id_to_piece(index).replace("▁", " ") for index in range(len(original)) if index not in special]
    generator = random.Random(0)
    texts = pieces + ["".join(generator.choices([*pieces, " ", "  ", "\n", "é", "猫", "🙂"], k=30)) for _ in range(500)]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == original.encode(text), text
        assert tokenizer.decode(ids) == original.decode(ids), text


PRINT_IDS = """
import sys
sys.modules["sentencepiece"] = None  # as if protobuf were too old for the one that is installed
from internvl.model.tokenizers.loading import load_tokenizer
print(load_tokenizer(sys.argv[1])("A cat 猫, 12 dogs").input_ids)
"""


@pytest.mark.multiprocess
def test_protobuf_may_be_older_than_that_of_sentencepiece(goldens):
    folder = str(goldens / INTERNLM2[0])
    command = [sys.executable, "-c", PRINT_IDS, folder]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(PACKAGE_DIR)})
    assert done.stdout.strip() == str(load_tokenizer(folder)("A cat 猫, 12 dogs").input_ids), done.stderr


@pytest.mark.parametrize("name", INTERNLM2)
def test_added_tokens_file_is_sufficient(goldens, tmp_path, name):
    """Older checkpoints list their tokens in added_tokens.json and special_tokens_map.json only."""
    shutil.copytree(goldens / name, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    renamed_pieces = {t["content"]: int(i) for i, t in config.pop("added_tokens_decoder").items() if int(i) < 1000}
    added = json.loads((tmp_path / "added_tokens.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps(renamed_pieces | added))
    assert_equals_recorded(load_tokenizer(tmp_path), goldens / name)


@pytest.mark.parametrize("name", INTERNLM2)
def test_save_and_reload(goldens, tmp_path, name):
    tokenizer = load_tokenizer(goldens / name, add_bos_token=False)
    tokenizer.add_tokens(["<extra>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    for reloaded in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert reloaded.get_vocab() == tokenizer.get_vocab()
        assert reloaded.all_special_tokens == tokenizer.all_special_tokens
        assert reloaded.model_max_length == tokenizer.model_max_length
        for row in load_encodings(goldens / name):
            text = row["text"] + "<extra>"
            assert reloaded(text).input_ids == tokenizer(text).input_ids == [*row["ids_no_special"], len(tokenizer) - 1]
            assert reloaded.decode(row["ids"]) == row["decoded"]


def test_fields_for_upstream_are_saved(goldens, tmp_path):
    """Added tokens, and the code file that upstream loads."""
    folder = goldens / "tokenizer_internlm2"
    load_tokenizer(folder).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    original = json.loads((folder / "tokenizer_config.saved_by_upstream.json").read_text())
    assert {name: saved[name] for name in original} == original
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_other_tokenizer_files_are_ignored_but_the_chat_template_is_used(goldens, tmp_path):
    folder = goldens / "tokenizer_internlm2"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.copy(goldens / "tokenizer" / "tokenizer.json", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(tmp_path).save_pretrained(tmp_path / "saved")
    for tokenizer in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "saved")):
        assert_equals_recorded(tokenizer, folder)
        messages = [{"role": "user", "content": "Hello"}]
        ids = tokenizer.apply_chat_template(messages)["input_ids"]
        assert ids == tokenizer("<|im_start|>user\nHello").input_ids


def test_sentencepiece_options_are_not_supported(goldens):
    with pytest.raises(ValueError, match="enable_sampling.*is not supported"):
        load_tokenizer(goldens / "tokenizer_internlm2", sp_model_kwargs={"enable_sampling": True})


def test_bos_and_eos_switches(goldens):
    tokenizer = load_tokenizer(goldens / "tokenizer_internlm2")
    bare = tokenizer("Hello", add_special_tokens=False).input_ids
    for bos in (True, False):
        for eos in (True, False):
            tokenizer.add_bos_token, tokenizer.add_eos_token = bos, eos
            assert tokenizer("Hello").input_ids == [1] * bos + bare + [2] * eos


def test_upstreams_fast_class_pads_on_the_left(goldens):
    folder = goldens / "tokenizer_internlm2"
    fast, slow = InternLM2TokenizerFast.from_pretrained(folder), InternLM2Tokenizer.from_pretrained(folder)
    (long,), (short,) = (slow([text]).input_ids for text in ("Hello there", "x"))
    padding = [slow.pad_token_id] * (len(long) - len(short))
    assert slow(["Hello there", "x"], padding=True).input_ids == [long, short + padding]
    assert fast(["Hello there", "x"], padding=True).input_ids == [long, padding + short]
    assert_equals_recorded(fast, folder)


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="checkpoint folder .*nowhere. does not exist"):
        load_tokenizer(tmp_path / "nowhere")
