"""generation_config.json: read with a checkpoint, used by `generate`, saved with every field."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.base_files import GENERATION_CONFIG, read_generation_config
from helpers.tiny_models import TINY_LLM, TINY_LLMS, make_tiny_checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM

from internvl.model.chat_template import save_tokenizer
from internvl.model.compose import compose_chat_model
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.internvl_chat.generation import load_generation_config
from internvl.model.tokenizers.loading import load_tokenizer

IDS = torch.arange(100, 110)[None]
GREEDY = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.0}


@pytest.fixture
def base(tmp_path, goldens) -> Path:
    make_tiny_checkpoint(tmp_path / "base", goldens / "tokenizer")
    return tmp_path / "base"


def write_config(folder: Path, **fields) -> None:
    (folder / "generation_config.json").write_text(json.dumps(fields))


def save_adapters(base: Path, folder: Path) -> Path:
    model = InternVLChatModel.from_pretrained(base).requires_grad_(False)
    model.wrap_llm_lora(2, 4)
    model.base_checkpoint = describe_base_checkpoint(base)
    save_adapter_checkpoint(model, folder, gather_trained_tensors(model))
    return folder


@pytest.mark.parametrize("is_derived", [False, True])
def test_every_field_is_read_and_saved(base, tmp_path, is_derived):
    """Also those of published checkpoints, which say that they were derived from the model's configuration."""
    expected = {**GENERATION_CONFIG, "unknown_dict": {"a": [1, {"b": 2}]}}
    expected |= {"_from_model_config": True} if is_derived else {}
    write_config(base, **expected)
    model = InternVLChatModel.from_pretrained(base)
    for config in (model.generation_config, model.language_model.generation_config):
        assert config.eos_token_id == [2, 998] and config.temperature == 0.7
    model.save_pretrained(tmp_path / "full")
    assert read_generation_config(tmp_path / "full") == expected
    run = save_adapters(base, tmp_path / "run")
    assert read_generation_config(run) == expected
    assert InternVLChatModel.from_pretrained(run).generation_config.eos_token_id == [2, 998]


def test_values_that_transformers_refuses_to_save_are_kept(base, tmp_path):
    """A temperature without sampling, as some published models have it."""
    write_config(base, do_sample=False, temperature=0.1)
    model = InternVLChatModel.from_pretrained(base)
    model.language_model.generation_config.eos_token_id = [2]
    model.save_pretrained(tmp_path / "out")
    assert read_generation_config(tmp_path / "out") == {"do_sample": False, "temperature": 0.1, "eos_token_id": [2]}


def test_a_checkpoint_without_the_file_has_the_llms_values(base, tmp_path):
    (base / "generation_config.json").unlink()
    model = InternVLChatModel.from_pretrained(base)
    model.save_pretrained(tmp_path / "out")
    assert read_generation_config(tmp_path / "out")["eos_token_id"] == 2


def test_adapter_checkpoints_of_earlier_versions_have_that_of_the_base(base, tmp_path):
    run = save_adapters(base, tmp_path / "run")
    assert read_generation_config(run)["_from_model_config"] and read_generation_config(run)["eos_token_id"] == 2
    write_config(base, **GENERATION_CONFIG)
    assert InternVLChatModel.from_pretrained(run).generation_config.eos_token_id == [2, 998]
    write_config(run, eos_token_id=[7])  # of the run itself
    assert InternVLChatModel.from_pretrained(run).language_model.generation_config.eos_token_id == [7]


def test_generate_stops_at_its_end_tokens(base):
    free = InternVLChatModel.from_pretrained(base).generate(input_ids=IDS, **GREEDY)[0].tolist()
    write_config(base, **GENERATION_CONFIG | {"eos_token_id": [2, free[3]]})
    stopped = InternVLChatModel.from_pretrained(base).generate(input_ids=IDS, **GREEDY)[0].tolist()
    assert stopped == free[: free.index(free[3]) + 1]


@pytest.mark.parametrize("adapted", [False, True])
def test_chat_ignores_it(base, tmp_path, goldens, adapted):
    """As in upstream; the caller passes settings, the template the end of an answer."""
    tokenizer, settings = load_tokenizer(goldens / "tokenizer"), {"max_new_tokens": 12}
    source = save_adapters(base, tmp_path / "run") if adapted else base
    answer = InternVLChatModel.from_pretrained(source).chat(tokenizer, None, "Hi", settings)
    end_ids = tokenizer(answer).input_ids[:1]
    write_config(source, **GENERATION_CONFIG | {"eos_token_id": end_ids, "temperature": 100.0, "top_k": 1000})
    model = InternVLChatModel.from_pretrained(source)
    assert [model.chat(tokenizer, None, "Hi", settings) for _ in range(3)] == [answer] * 3
    assert model.generation_config.eos_token_id == end_ids  # restored


@pytest.mark.parametrize("fields", [{"max_new_tokens": -1}, {"compile_config": {}}, {"to_json_file": 1}])
def test_invalid_values_are_errors_of_one_line(base, fields):
    write_config(base, **fields)
    with pytest.raises(ValueError, match=r"^[^\n]*generation_config.json[^\n]*$"):
        InternVLChatModel.from_pretrained(base)


INVALID_TYPES = {
    "eos_token_id": ["2", 2.0, True, ["2"], [2, None], [[2]], {"a": 2}, 2**40],
    "bos_token_id": ["1"],
    "pad_token_id": ["5", [5], False],
    "suppress_tokens": [5, ["5"]],
    "max_new_tokens": ["7", 7.5],
    "top_k": [50.0],
    "temperature": ["0.7", True, [0.7], float("nan")],
    "repetition_penalty": ["1.05"],
    "do_sample": ["yes", 1, "true"],
    "use_cache": ["no"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in INVALID_TYPES.items() for value in values]
)
def test_values_of_a_wrong_type_are_refused(tmp_path, name, value):
    write_config(tmp_path, **{name: value})
    message = f"generation_config.json is invalid: {name} is {value!r}, expected "
    with pytest.raises(ValueError, match=re.escape(message) + r"[^\n]+; correct or remove it\.$"):
        load_generation_config(tmp_path)


def test_values_of_a_wrong_type_are_refused_with_every_model(base, tmp_path):
    write_config(base, eos_token_id="2")
    llm = Qwen2ForCausalLM(Qwen2Config(**TINY_LLM | TINY_LLMS["qwen2"]))
    llm.save_pretrained(tmp_path / "llm")
    write_config(tmp_path / "llm", eos_token_id="2")
    for load_fn in (
        lambda: InternVLChatModel.from_pretrained(base),
        lambda: compose_chat_model(base, tmp_path / "llm", template="internvl2_5"),
    ):
        with pytest.raises(ValueError, match="eos_token_id is '2', expected an integer or a list of integers"):
            load_fn()


def test_values_of_published_models_are_accepted(tmp_path):
    fields = {"eos_token_id": 2, "pad_token_id": -1, "temperature": 1, "top_k": None, "do_sample": None}
    write_config(tmp_path, **fields, bos_token_id=[1], suppress_tokens=[])
    assert load_generation_config(tmp_path).pad_token_id == -1


# -- ids that end an answer --------------------------------------------------------------------------------------------

# Stored ids -> ids of a result. Template internvl2_5 adds <|im_end|> 999, the tokenizer <|endoftext|> 997.
END_IDS = {
    "of the LLM": (997, [997, 999]),
    "a list": ([998, 2], [998, 2, 999, 997]),
    "end mark only": (999, [999, 997]),
    "complete": ([2, 997, 999], [2, 997, 999]),
    "complete, in another order": ([999, 997], [999, 997]),
    "none": (None, [999, 997]),
}


@pytest.mark.parametrize(("stored", "expected"), END_IDS.values(), ids=END_IDS)
def test_results_end_where_chat_does(base, tmp_path, stored, expected):
    fields = {"do_sample": True, "temperature": 0.7, "unknown": {"a": 1}}
    write_config(tmp_path, **fields, eos_token_id=stored)
    tokenizer = load_tokenizer(base)
    tokenizer.eos_token = "<|endoftext|>"
    for _ in range(2):  # also of a result
        save_tokenizer(tokenizer, InternVLChatConfig.from_pretrained(base), tmp_path)
        assert read_generation_config(tmp_path) == fields | {"eos_token_id": expected}


def test_one_id_stays_an_integer(base, tmp_path):
    """In most published models the end mark is the tokenizer's end-of-text token."""
    write_config(tmp_path, eos_token_id=999)
    before = (tmp_path / "generation_config.json").read_bytes()
    save_tokenizer(load_tokenizer(base), InternVLChatConfig.from_pretrained(base), tmp_path)
    assert (tmp_path / "generation_config.json").read_bytes() == before


def test_an_end_mark_that_is_no_token_adds_no_id(base, tmp_path):
    config = InternVLChatConfig.from_pretrained(base)
    config.template = "phi3-chat"  # <|end|>
    write_config(tmp_path, eos_token_id=[2, 999])
    save_tokenizer(load_tokenizer(base), config, tmp_path)
    assert read_generation_config(tmp_path) == {"eos_token_id": [2, 999]}
