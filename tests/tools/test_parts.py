"""Tools that take parts out of a chat checkpoint or change them; where there are adapters, they count."""

import importlib.util

import pytest
import torch
from helpers.tiny_models import LLM, WIDTH, make
from tools.convert_to_int8 import main as convert_to_int8
from tools.extract_mlp import main as extract_mlp
from tools.extract_vit import main as extract_vit
from tools.replace_llm import main as replace_llm
from tools.resize_pos_embed import main as resize_pos_embed
from transformers import LlamaConfig, LlamaForCausalLM

from internvl.constants import SPECIAL_TOKENS
from internvl.model.compose import compose, load_projector
from internvl.model.internvl_chat import InternVisionModel, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.lora import LORA_RANK_FIELDS, LoraSettings
from internvl.model.tokenizers.loading import load_tokenizer


@pytest.fixture
def plain(tmp_path, goldens):
    """A chat checkpoint, and its model in bfloat16."""
    make(tmp_path / "chat", goldens / "tokenizer")
    return tmp_path / "chat", InternVLChatModel.from_pretrained(tmp_path / "chat", dtype=torch.bfloat16)


@pytest.fixture
def wrapped(tmp_path, goldens):
    """A checkpoint with adapters that change something in both parts, and its model, merged."""
    make(tmp_path / "lora", goldens / "tokenizer", use_backbone_lora=2, use_llm_lora=2)
    return tmp_path / "lora", merge_adapters(InternVLChatModel.from_pretrained(tmp_path / "lora", dtype=torch.bfloat16))


@pytest.fixture
def on_base(tmp_path, goldens):
    """What a LoRA run writes: adapters in all parts on a base; and the model, merged."""
    model = make(tmp_path / "base", goldens / "tokenizer")
    for part in LORA_RANK_FIELDS:
        model.add_part_adapters(part, LoraSettings(2, 4))
    for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
        torch.nn.init.normal_(parameter, std=0.1)
    model.base_checkpoint = describe_base_checkpoint(tmp_path / "base")
    save_adapter_checkpoint(model, tmp_path / "run", gather_trained_tensors(model))
    load_tokenizer(goldens / "tokenizer").save_pretrained(tmp_path / "run")
    opened = InternVLChatModel.from_pretrained(tmp_path / "run", dtype=torch.bfloat16)
    return tmp_path / "run", merge_adapters(opened)


@pytest.fixture(params=["plain", "wrapped", "on_base"])
def chat(request):
    return request.getfixturevalue(request.param)


def assert_same(found: torch.nn.Module, expected: torch.nn.Module):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name].bfloat16(), expected[name]), name


def test_extracted_vit_is_the_chat_models(chat, tmp_path):
    folder, model = chat
    extract_vit([str(folder), str(tmp_path / "vit")])
    vit = InternVisionModel.from_pretrained(tmp_path / "vit")
    assert vit.dtype == torch.bfloat16
    assert_same(vit, model.vision_model)
    pixels = torch.randn(1, 3, 56, 56)
    assert torch.equal(vit(pixels).last_hidden_state, model.vision_model(pixels).last_hidden_state)
    with pytest.raises(SystemExit, match="not empty"):
        extract_vit([str(folder), str(tmp_path / "vit")])


def test_extracted_projector_is_what_training_loads(chat, tmp_path):
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


def test_resized_checkpoint_takes_larger_tiles(chat, tmp_path):
    folder, model = chat
    resize_pos_embed([str(folder), str(tmp_path / "large"), "112"])
    large = InternVLChatModel.from_pretrained(tmp_path / "large")
    assert large.num_image_token == 16 and large.config.force_image_size == large.config.vision_config.image_size == 112
    pixels = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(large.extract_feature(pixels), model.extract_feature(pixels), atol=0.05, rtol=0.05)
    assert load_tokenizer(tmp_path / "large").get_vocab() == load_tokenizer(folder).get_vocab()
    with pytest.raises(SystemExit, match="a tile of 100 pixels does not divide"):
        resize_pos_embed([str(folder), str(tmp_path / "odd"), "100"])


def test_resizing_asks_the_config_for_the_patch_size(tmp_path, goldens, monkeypatch):
    from helpers.tiny_models import VITS

    monkeypatch.setitem(VITS, "coarse", {**VITS["6B"], "patch_size": 28})
    make(tmp_path / "chat", goldens / "tokenizer", vit="coarse")
    resize_pos_embed([str(tmp_path / "chat"), str(tmp_path / "large"), "112"])
    embeddings = InternVLChatModel.from_pretrained(tmp_path / "large").vision_model.embeddings
    assert embeddings.position_embedding.shape[1] == 1 + (112 // 28) ** 2


@pytest.mark.parametrize("width", [WIDTH, 2 * WIDTH])
def test_another_llm_in_the_place_of_the_old(plain, width, tmp_path, goldens, capsys):
    """A Llama with a head, of the same width or another, whose tokenizer knows no image token."""
    folder, model = plain
    llm = LlamaForCausalLM(LlamaConfig(**LLM | {"hidden_size": width, "vocab_size": 1100}))
    llm.bfloat16().save_pretrained(tmp_path / "llm")
    load_tokenizer(goldens / "tokenizer_phi3_fast").save_pretrained(tmp_path / "llm")
    lacking = set(SPECIAL_TOKENS) - set(load_tokenizer(tmp_path / "llm").get_vocab())

    replace_llm([f"{folder}/", str(tmp_path / "llm")])
    out = tmp_path / "chat_replace_llm"
    new, tokenizer = InternVLChatModel.from_pretrained(out, dtype=torch.bfloat16).eval(), load_tokenizer(out)
    assert_same(new.vision_model, model.vision_model)
    assert new.config.hidden_size == new.config.llm_config.hidden_size == width
    assert new.num_image_token == model.num_image_token and new.template == model.template
    old_rows = len(tokenizer) - len(lacking)
    assert set(SPECIAL_TOKENS) <= set(tokenizer.get_vocab())
    heads, embeddings = (new.get_output_embeddings(), llm.lm_head), (new.get_input_embeddings(), llm.model.embed_tokens)
    for found, expected in (heads, embeddings):
        assert found.weight.shape[0] >= len(tokenizer)
        assert torch.equal(found.weight[:old_rows], expected.weight[:old_rows])
    printed = capsys.readouterr().out
    assert ("the projector mlp1 starts afresh" in printed) == (width != WIDTH)
    assert "was Qwen2ForCausalLM and is LlamaForCausalLM" in printed
    if width == WIDTH:
        assert_same(new.mlp1, model.mlp1)
    answer = new.chat(tokenizer, torch.randn(1, 3, 56, 56).bfloat16(), "Hi", {"max_new_tokens": 3})
    assert isinstance(answer, str)


@pytest.mark.parametrize("folder", ["wrapped", "on_base"])
def test_adapters_are_merged_before_parts_are_exchanged(request, folder):
    source, _ = request.getfixturevalue(folder)
    plain_weights_only = "holds LoRA adapters, not plain weights: merge them first with tools/merge_lora.py"
    with pytest.raises(SystemExit, match=plain_weights_only):
        replace_llm([str(source), str(source)])
    with pytest.raises(ValueError, match=plain_weights_only):
        compose(source, source)


def test_one_sentence_for_what_is_no_checkpoint(tmp_path, plain):
    for tool, words in ((extract_vit, ["x"]), (extract_mlp, ["x"]), (resize_pos_embed, ["x", "56"]), (replace_llm, [])):
        with pytest.raises(SystemExit, match="^error: no checkpoint in"):
            tool([str(tmp_path / "nowhere"), *(str(tmp_path / w) if w == "x" else w for w in words or ["llm"])])


HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_int8_says_what_it_needs(plain, tmp_path):
    with pytest.raises(SystemExit, match="pip install bitsandbytes"):
        convert_to_int8([str(plain[0]), str(tmp_path / "int8")])
    assert not (tmp_path / "int8").exists()


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_int8_answers_almost_like_the_original(plain, tmp_path):
    """On the GPU where there is one."""
    convert_to_int8([str(plain[0]), str(tmp_path / "int8")])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = InternVLChatModel.from_pretrained(tmp_path / "int8", device_map=device)
    assert small.language_model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    ids = torch.arange(20, device=device)[None]
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits.float() for model in (small, plain[1].to(device))]
    assert torch.cosine_similarity(*(x.flatten() for x in logits), dim=0) > 0.99
