"""Tools that extract, replace or convert parts of a chat checkpoint."""

import importlib.util

import pytest
import torch
from helpers.lora_models import randomize_adapters
from helpers.tiny_models import LLM_WIDTH, TINY_LLM, TINY_VITS, make_tiny_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from internvl.constants import SPECIAL_TOKENS
from internvl.model.compose import compose_chat_model, load_projector
from internvl.model.internvl_chat import InternVisionModel, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.lora import LORA_RANK_FIELDS, LoraSettings
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.convert_to_int8 import main as convert_to_int8
from internvl.tools.extract_mlp import main as extract_mlp
from internvl.tools.extract_vit import main as extract_vit
from internvl.tools.replace_llm import main as replace_llm
from internvl.tools.resize_pos_embed import main as resize_pos_embed


@pytest.fixture
def full_checkpoint(tmp_path, goldens):
    """Return a chat checkpoint without adapters, and its model in bfloat16."""
    make_tiny_checkpoint(tmp_path / "chat", goldens / "tokenizer")
    return tmp_path / "chat", InternVLChatModel.from_pretrained(tmp_path / "chat", dtype=torch.bfloat16)


@pytest.fixture
def adapted_checkpoint(tmp_path, goldens):
    """Return a checkpoint with adapters among its weights, and the merged model."""
    make_tiny_checkpoint(tmp_path / "lora", goldens / "tokenizer", use_backbone_lora=2, use_llm_lora=2)
    return tmp_path / "lora", merge_adapters(InternVLChatModel.from_pretrained(tmp_path / "lora", dtype=torch.bfloat16))


@pytest.fixture
def adapter_checkpoint(tmp_path, goldens):
    """Return an adapter checkpoint (all parts), and the merged model."""
    model = make_tiny_checkpoint(tmp_path / "base", goldens / "tokenizer")
    for part in LORA_RANK_FIELDS:
        model.add_part_adapters(part, LoraSettings(2, 4))
    randomize_adapters(model, std=0.1)
    model.base_checkpoint = describe_base_checkpoint(tmp_path / "base")
    save_adapter_checkpoint(model, tmp_path / "run", gather_trained_tensors(model))
    load_tokenizer(goldens / "tokenizer").save_pretrained(tmp_path / "run")
    return tmp_path / "run", merge_adapters(InternVLChatModel.from_pretrained(tmp_path / "run", dtype=torch.bfloat16))


@pytest.fixture(params=["full_checkpoint", "adapted_checkpoint", "adapter_checkpoint"])
def chat(request):
    return request.getfixturevalue(request.param)


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module):
    actual_state, expected_state = actual.state_dict(), expected.state_dict()
    assert actual_state.keys() == expected_state.keys()
    for name in expected_state:
        assert torch.equal(actual_state[name].bfloat16(), expected_state[name]), name


def test_extracted_vit_equals_the_chat_models(chat, tmp_path):
    folder, model = chat
    extract_vit([str(folder), str(tmp_path / "vit")])
    vit = InternVisionModel.from_pretrained(tmp_path / "vit")
    assert vit.dtype == torch.bfloat16
    assert_same_weights(vit, model.vision_model)
    pixels = torch.randn(1, 3, 56, 56)
    assert torch.equal(vit(pixels).last_hidden_state, model.vision_model(pixels).last_hidden_state)
    with pytest.raises(SystemExit, match="not empty"):
        extract_vit([str(folder), str(tmp_path / "vit")])


def test_extracted_projector_is_loadable_by_training(chat, tmp_path):
    folder, model = chat
    extract_mlp([str(folder), str(tmp_path / "mlp")])
    state = torch.load(tmp_path / "mlp" / "mlp_projector.pth", weights_only=True)
    assert list(state) == ["0.bias", "0.weight", "1.bias", "1.weight", "3.bias", "3.weight"]
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    expected = {name: tensor.clone() for name, tensor in model.mlp1.state_dict().items()}
    torch.nn.init.zeros_(model.mlp1[1].weight)
    load_projector(model, tmp_path / "mlp" / "mlp_projector.pth")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.mlp1.state_dict().items())
    with pytest.raises(SystemExit, match="exists"):
        extract_mlp([str(folder), str(tmp_path / "mlp")])


def test_resized_checkpoint_accepts_larger_tiles(chat, tmp_path):
    folder, model = chat
    resize_pos_embed([str(folder), str(tmp_path / "large"), "112"])
    large = InternVLChatModel.from_pretrained(tmp_path / "large")
    assert large.num_image_token == 16 and large.config.force_image_size == large.config.vision_config.image_size == 112
    pixels = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(large.extract_feature(pixels), model.extract_feature(pixels), atol=0.05, rtol=0.05)
    assert load_tokenizer(tmp_path / "large").get_vocab() == load_tokenizer(folder).get_vocab()
    with pytest.raises(SystemExit, match="100 pixels is invalid: expected a multiple of 28"):
        resize_pos_embed([str(folder), str(tmp_path / "odd"), "100"])


def test_resizing_uses_the_patch_size_of_the_config(tmp_path, goldens, monkeypatch):
    monkeypatch.setitem(TINY_VITS, "coarse", {**TINY_VITS["6B"], "patch_size": 28})
    make_tiny_checkpoint(tmp_path / "chat", goldens / "tokenizer", vit="coarse")
    resize_pos_embed([str(tmp_path / "chat"), str(tmp_path / "large"), "112"])
    embeddings = InternVLChatModel.from_pretrained(tmp_path / "large").vision_model.embeddings
    assert embeddings.position_embedding.shape[1] == 1 + (112 // 28) ** 2


@pytest.mark.parametrize("width", [LLM_WIDTH, 2 * LLM_WIDTH])
def test_replace_llm(full_checkpoint, width, tmp_path, goldens, capsys):
    """Replace Qwen2 by a Llama whose tokenizer has no image tokens."""
    folder, model = full_checkpoint
    llm = LlamaForCausalLM(LlamaConfig(**TINY_LLM | {"hidden_size": width, "vocab_size": 1100}))
    llm.bfloat16().save_pretrained(tmp_path / "llm")
    load_tokenizer(goldens / "tokenizer_phi3_fast").save_pretrained(tmp_path / "llm")
    missing_tokens = set(SPECIAL_TOKENS) - set(load_tokenizer(tmp_path / "llm").get_vocab())

    replace_llm([f"{folder}/", str(tmp_path / "llm")])
    out = tmp_path / "chat_replace_llm"
    new, tokenizer = InternVLChatModel.from_pretrained(out, dtype=torch.bfloat16).eval(), load_tokenizer(out)
    assert_same_weights(new.vision_model, model.vision_model)
    assert new.config.hidden_size == new.config.llm_config.hidden_size == width
    assert new.num_image_token == model.num_image_token and new.template == model.template
    num_old_rows = len(tokenizer) - len(missing_tokens)
    assert set(SPECIAL_TOKENS) <= set(tokenizer.get_vocab())
    heads, embeddings = (new.get_output_embeddings(), llm.lm_head), (new.get_input_embeddings(), llm.model.embed_tokens)
    for new_layer, old_layer in (heads, embeddings):
        assert new_layer.weight.shape[0] >= len(tokenizer)
        assert torch.equal(new_layer.weight[:num_old_rows], old_layer.weight[:num_old_rows])
    printed = capsys.readouterr().out
    assert ("the projector mlp1 has random weights" in printed) == (width != LLM_WIDTH)
    assert "LLM: LlamaForCausalLM" in printed and "the LLM was Qwen2ForCausalLM" in printed
    if width == LLM_WIDTH:
        assert_same_weights(new.mlp1, model.mlp1)
    answer = new.chat(tokenizer, torch.randn(1, 3, 56, 56).bfloat16(), "Hi", {"max_new_tokens": 3})
    assert isinstance(answer, str)


@pytest.mark.parametrize("folder", ["adapted_checkpoint", "adapter_checkpoint"])
def test_replacing_parts_requires_merged_adapters(request, folder):
    source, _ = request.getfixturevalue(folder)
    message = "holds LoRA adapters, not plain weights: merge them first with `internvl merge`"
    with pytest.raises(SystemExit, match=message):
        replace_llm([str(source), str(source)])
    with pytest.raises(ValueError, match=message):
        compose_chat_model(source, source)


def test_folders_without_checkpoint_are_errors_of_one_line(tmp_path):
    output = str(tmp_path / "out")
    for tool, args in (
        (extract_vit, [output]),
        (extract_mlp, [output]),
        (resize_pos_embed, [output, "56"]),
        (replace_llm, ["llm"]),
    ):
        with pytest.raises(SystemExit, match="^error: no checkpoint in"):
            tool([str(tmp_path / "nowhere"), *args])


HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_int8_requires_bitsandbytes(full_checkpoint, tmp_path):
    with pytest.raises(SystemExit, match="pip install bitsandbytes"):
        convert_to_int8([str(full_checkpoint[0]), str(tmp_path / "int8")])
    assert not (tmp_path / "int8").exists()


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_int8_logits_are_close_to_the_originals(full_checkpoint, tmp_path):
    """Compare them on the GPU if there is one."""
    convert_to_int8([str(full_checkpoint[0]), str(tmp_path / "int8")])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantized = InternVLChatModel.from_pretrained(tmp_path / "int8", device_map=device)
    assert quantized.language_model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    ids = torch.arange(20, device=device)[None]
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits.float() for model in (quantized, full_checkpoint[1].to(device))]
    assert torch.cosine_similarity(*(x.flatten() for x in logits), dim=0) > 0.99
