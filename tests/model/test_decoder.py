"""The attention implementation that a caller requests reaches both parts; attention weights are transformers'."""

import copy
import json

import pytest
import torch
from helpers.model_cases import ModelCase

from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel

LLMS = ["qwen2", "internlm2", "llama", "phi3"]
TEXT = torch.arange(5, 15)[None]


def get_implementation(model: InternVLChatModel) -> str:
    return model.language_model.config._attn_implementation


@pytest.mark.parametrize("name", LLMS)
@torch.no_grad()
def test_attention_weights_of_every_layer_equal_those_of_the_llm_class(goldens, name):
    model = ModelCase(goldens / "models" / name).model(attn_implementation="eager")
    attentions = model(None, TEXT, output_attentions=True).attentions
    config = copy.deepcopy(model.config.llm_config)
    llm = type(model.language_model)._from_config(config, attn_implementation="eager").eval()
    llm.load_state_dict(model.language_model.state_dict())
    expected = llm(input_ids=TEXT, output_attentions=True).attentions
    assert len(attentions) == len(expected) == config.num_hidden_layers
    for ours, theirs in zip(attentions, expected, strict=True):
        assert ours.shape == (1, config.num_attention_heads, 10, 10)
        torch.testing.assert_close(ours.sum(-1), torch.ones(ours.shape[:-1]))
        torch.testing.assert_close(ours, theirs)


def test_every_way_to_request_an_implementation(goldens):
    folder = goldens / "models/qwen2"
    fields = json.loads((folder / "config.json").read_text())
    llm_fields = fields.pop("llm_config")

    changed = InternVLChatConfig.from_pretrained(folder)
    changed.llm_config.attn_implementation = "eager"
    configs = {
        "field": InternVLChatConfig(**fields, llm_config=llm_fields, attn_implementation="eager"),
        "field of llm_config": InternVLChatConfig(**fields, llm_config=llm_fields | {"attn_implementation": "eager"}),
        "attribute of llm_config": changed,
    }
    for way, config in configs.items():
        model = InternVLChatModel.from_pretrained(folder, config=config)
        assert get_implementation(model) == "eager", way
        assert get_implementation(InternVLChatModel(model.config)) == "eager", way
    for implementation in ("eager", "sdpa"):
        model = InternVLChatModel.from_pretrained(folder, attn_implementation=implementation)
        assert get_implementation(model) == implementation
        assert not model.config.vision_config.use_flash_attn


def test_the_value_in_a_config_file_is_ignored_and_never_written(goldens, tmp_path):
    """It describes the machine of its author. Upstream's key has one of upstream's values."""
    model = InternVLChatModel.from_pretrained(goldens / "models/qwen2", attn_implementation="sdpa")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "attn_implementation" not in saved
    assert saved["llm_config"]["attn_implementation"] == "eager"
    reloaded = InternVLChatModel.from_pretrained(tmp_path)
    default = InternVLChatModel(reloaded.config)
    assert get_implementation(reloaded) == get_implementation(default) == "sdpa"


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("flash_attention_2", "flash_attention_2 requires the package flash-attn and a GPU"),
        ("fast", "'fast' is not supported: expected eager, sdpa, flash_attention_2"),
        ({"llm_config": "eager"}, "{'llm_config': 'eager'} is not supported"),
    ],
)
def test_unavailable_implementations_are_refused(goldens, requested, message):
    if requested == "flash_attention_2" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=f"^attn_implementation {message}"):
        InternVLChatModel.from_pretrained(goldens / "models/qwen2", attn_implementation=requested)
