"""Loading checkpoints: errors, dtype, tokens, image size, device map."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers.model_cases import ModelCase
from helpers.paths import PACKAGE_DIR
from safetensors.torch import load_file, save_file

from internvl.model import load_model_and_tokenizer, split_model
from internvl.model.compose import add_special_tokens
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.resize import set_image_size
from internvl.model.tokenizers.loading import load_tokenizer


@pytest.fixture
def make_checkpoint(goldens, tmp_path):
    """Return a function that copies a checkpoint with changed weights."""

    def make(change_fn) -> Path:
        source = goldens / "models" / "internlm2"
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        weights = load_file(source / "model.safetensors")
        change_fn(weights)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


def test_wrong_keys_are_listed(make_checkpoint):
    def change(weights):
        weights["language_model.model.norm.wait"] = weights.pop("language_model.model.norm.weight")
        del weights["mlp1.0.bias"]
        weights["mlp1.3.bias"] = torch.zeros(3)

    with pytest.raises(ValueError) as error:
        InternVLChatModel.from_pretrained(make_checkpoint(change))
    assert str(error.value).partition("do not match the model of its config.json: ")[2].split("; ") == [
        "missing: language_model.model.norm.weight, mlp1.0.bias",
        "unexpected: language_model.model.norm.wait",
        "mismatched: mlp1.3.bias (3,) for (32,)",
    ]


def test_integer_weights_are_named(make_checkpoint):
    """transformers would convert them: 0.03 has become 0."""

    def change(weights):
        weights["mlp1.3.bias"] = weights["mlp1.3.bias"].int()

    with pytest.raises(ValueError, match=r"not floating: mlp1.3.bias \(expected floating point, got I32\)$"):
        InternVLChatModel.from_pretrained(make_checkpoint(change))


def test_rotary_buffers_of_old_checkpoints_are_ignored(make_checkpoint):
    def change(weights):
        weights["language_model.model.layers.0.attention.rotary_emb.inv_freq"] = torch.zeros(4)

    InternVLChatModel.from_pretrained(make_checkpoint(change))


def test_only_safetensors_are_read(make_checkpoint):
    folder = make_checkpoint(lambda weights: None)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"are pickled \(pytorch_model.bin\).*--allow_pickle True"):
        InternVLChatModel.from_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match="safetensors"):
        InternVLChatModel.from_pretrained(folder)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_dtype(model_case, argument):
    assert model_case.model().dtype == torch.float32  # the checkpoint's own
    model = model_case.model(**{argument: torch.bfloat16})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.fixture
def model_and_tokenizer(goldens):
    """Load a model and the tokenizer of its vocabulary."""
    return InternVLChatModel.from_pretrained(goldens / "e2e" / "qwen2"), load_tokenizer(goldens / "tokenizer")


def test_rows_of_new_tokens_are_the_mean_of_the_old_ones(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    old = [e.weight.detach().clone() for e in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert add_special_tokens(model, tokenizer, ["<img>", "</img>"]) == 0  # known already: nothing changes
    assert torch.equal(model.get_input_embeddings().weight, old[0])

    assert add_special_tokens(model, tokenizer, ["<img>", "<one>", "<two>"]) == 2
    assert model.config.llm_config.vocab_size == model.language_model.config.vocab_size == len(tokenizer)
    for before, layer in zip(old, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        rows = len(tokenizer) - 2
        assert len(layer.weight) == len(tokenizer)
        assert torch.equal(layer.weight[:rows], before[:rows])
        torch.testing.assert_close(layer.weight[rows:], before[:rows].mean(0).expand(2, -1))
    assert tokenizer.convert_tokens_to_ids("<two>") == len(tokenizer) - 1


def test_known_tokens_without_a_row_get_one(model_and_tokenizer):
    """A tokenizer may have image tokens for which embeddings lack rows."""
    model, tokenizer = model_and_tokenizer
    rows = len(tokenizer) - 3
    model.language_model.resize_token_embeddings(rows)
    assert add_special_tokens(model, tokenizer, ["<img>"]) == 0
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert len(layer.weight) == len(tokenizer)
        torch.testing.assert_close(layer.weight[rows:], layer.weight[:rows].mean(0).expand(3, -1))


@pytest.mark.parametrize("num_rows", [300, 90])
@pytest.mark.parametrize("name", ["qwen2", "internlm2", "tied", "adapted"])
@torch.no_grad()
def test_resized_models_reload(goldens, tmp_path, name, num_rows):
    folder = goldens / "models" / ("internlm2" if name == "internlm2" else "qwen2")
    config = InternVLChatConfig.from_pretrained(folder)
    config.tie_word_embeddings = config.llm_config.tie_word_embeddings = name == "tied"
    model = InternVLChatModel(config).eval()
    if name == "adapted":
        model.wrap_llm_lora(r=2)
    embeddings = model.resize_token_embeddings(num_rows, mean_resizing=False)
    assert embeddings is model.get_input_embeddings()
    assert embeddings.num_embeddings == model.lm_head.out_features == num_rows
    assert (model.lm_head.weight is embeddings.weight) == (name == "tied")
    model.save_pretrained(tmp_path)
    reloaded = InternVLChatModel.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[3, 5, num_rows - 1]])
    assert reloaded.config.llm_config.vocab_size == num_rows
    assert (reloaded.lm_head.weight is reloaded.get_input_embeddings().weight) == (name == "tied")
    torch.testing.assert_close(reloaded(None, ids).logits, model(None, ids).logits)


def test_embeddings_with_adapters_are_not_resized(goldens):
    model = InternVLChatModel.from_pretrained(goldens / "models/qwen2")
    model.wrap_llm_lora(r=2, targets=["lm_head"])
    with pytest.raises(ValueError, match="not supported while an embedding has adapters: merge them first"):
        model.resize_token_embeddings(300)
    assert model.resize_token_embeddings().num_embeddings == model.config.llm_config.vocab_size


def test_set_image_size(goldens):
    case = ModelCase(goldens / "models" / "qwen2")
    model, size = case.model(), 2 * case.model().config.vision_config.image_size
    set_image_size(model, size)
    assert model.config.force_image_size == model.config.vision_config.image_size == size
    assert model.num_image_token == 4 * case.meta["num_image_token"]
    assert model.extract_feature(torch.zeros(1, 3, size, size)).shape[1] == model.num_image_token
    with pytest.raises(ValueError, match=f"{size + 14} pixels"):
        set_image_size(model, size + 14)


def test_models_with_new_tokens_and_image_size_reload(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    add_special_tokens(model, tokenizer, ["<one>"])
    set_image_size(model, 2 * model.config.vision_config.image_size)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    args = Namespace(checkpoint=str(tmp_path), auto=False, load_in_8bit=False, load_in_4bit=False)
    reloaded, reloaded_tokenizer = load_model_and_tokenizer(args)
    assert reloaded.num_image_token == model.num_image_token and len(reloaded_tokenizer) == len(tokenizer)
    assert not reloaded.training and reloaded.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name].cpu(), tensor.to(torch.bfloat16)), name


def test_split_model(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    devices = split_model(32)
    layers = [devices[f"language_model.model.layers.{i}"] for i in range(32)]
    assert layers == [0] * 5 + [1] * 10 + [2] * 10 + [3] * 6 + [0]
    assert {devices[name] for name in ("vision_model", "mlp1", "language_model.lm_head")} == {0}


@pytest.mark.multiprocess
def test_importing_prints_nothing():
    program = "from internvl.model.internvl_chat import InternVLChatModel"
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE_DIR)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
