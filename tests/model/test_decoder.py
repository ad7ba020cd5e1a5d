"""The attention implementation that a caller requests reaches both parts; attention weights are transformers'."""

import copy
import importlib
import json
import sys

import pytest
import torch
import transformers
from helpers.model_cases import ModelCase
from helpers.tiny_models import build_tiny_model
from transformers import BloomForCausalLM, GptOssForCausalLM, Qwen2ForCausalLM

from internvl.model.internlm2.modeling_internlm2 import InternLM2ForCausalLM
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.decoder import FLASH_VERSIONS, is_flash_available, select_attn_implementation

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
        *((name, f"{name} requires the package {flash.package}, a") for name, flash in FLASH_VERSIONS.items()),
        ("fast", "'fast' is not supported: expected eager, sdpa, flash_attention_2"),
        ({"llm_config": "eager"}, "{'llm_config': 'eager'} is not supported"),
    ],
)
def test_unavailable_implementations_are_refused(goldens, requested, message):
    if isinstance(requested, str) and requested in FLASH_VERSIONS and is_flash_available(requested):
        pytest.skip("it is available")
    with pytest.raises(ValueError, match=f"^attn_implementation {message}"):
        InternVLChatModel.from_pretrained(goldens / "models/qwen2", attn_implementation=requested)


def test_a_soft_cap_of_attention_is_never_ignored():
    """transformers < 5.21 offers sdpa for Gemma 2, without the cap."""
    model = build_tiny_model("Gemma2ForCausalLM")
    assert get_implementation(model) == "eager"
    model.config.attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="^attn_implementation sdpa is not supported by Gemma2ForCausalLM: use eager"):
        InternVLChatModel(model.config)


def install_flash_attn(monkeypatch, folder, versions: str, capability: tuple[int, int]):
    """Make a GPU and packages of flash-attn, as transformers finds them."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for name, flash in FLASH_VERSIONS.items():
        is_installed = name[-1] in versions
        monkeypatch.setattr(transformers.utils, flash.check, lambda value=is_installed: value, raising=False)
        monkeypatch.delitem(sys.modules, flash.module, raising=False)
    # flash-attn 2 and 4 share a package
    for path in ("flash_attn/__init__.py", "flash_attn/cute.py", "flash_attn_interface.py"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()


@pytest.fixture
def no_flash_modules():
    """Forget the packages that a test has made."""
    yield
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        del sys.modules[name]


@pytest.mark.usefixtures("no_flash_modules")
@pytest.mark.parametrize(
    ("versions", "capability", "expected"),
    [
        ("", (9, 0), None),
        ("2", (7, 5), None),
        ("2", (8, 0), "flash_attention_2"),
        ("23", (8, 9), "flash_attention_2"),
        ("23", (9, 0), "flash_attention_3"),
        ("234", (9, 0), "flash_attention_4"),
        ("234", (10, 0), "flash_attention_4"),
        ("3", (10, 0), None),
        ("234", (12, 0), "flash_attention_2"),
    ],
)
def test_the_newest_flash_attn_for_the_gpu_is_selected(versions, capability, expected, monkeypatch, tmp_path):
    install_flash_attn(monkeypatch, tmp_path, versions, capability)
    for llm_class in (Qwen2ForCausalLM, InternLM2ForCausalLM):
        assert select_attn_implementation(llm_class, torch.bfloat16) == expected
        assert select_attn_implementation(llm_class, torch.float32) is None
    assert select_attn_implementation(BloomForCausalLM, torch.bfloat16) is None, "it does not support flash-attn"
    with_sinks = expected if expected in GptOssForCausalLM._compatible_flash_implementations else None
    assert select_attn_implementation(GptOssForCausalLM, torch.bfloat16) == with_sinks


@pytest.mark.usefixtures("no_flash_modules")
def test_versions_of_flash_attn_that_do_not_work_are_not_selected(monkeypatch, tmp_path):
    install_flash_attn(monkeypatch, tmp_path, "234", (9, 0))
    assert all(map(is_flash_available, FLASH_VERSIONS))
    monkeypatch.delattr(transformers.utils, "is_flash_attn_4_available")  # older versions of transformers lack it
    (tmp_path / "flash_attn_interface.py").write_text('raise ImportError("undefined symbol")')
    del sys.modules["flash_attn_interface"]
    importlib.invalidate_caches()
    assert select_attn_implementation(Qwen2ForCausalLM, torch.bfloat16) == "flash_attention_2"
