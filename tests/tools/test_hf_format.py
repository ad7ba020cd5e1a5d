"""Conversion between custom and HF format: equal logits, exact round trip."""

import json

import pytest
import torch
from helpers.paths import REAL_CONFIGS
from helpers.tiny_models import TINY_LLMS, make_tiny_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, InternVLForConditionalGeneration

from internvl.model.hf.config import convert_config_to_hf
from internvl.model.hf.weights import convert_weights_to_hf
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.safetensors_io import CheckpointTensors, save_tensors
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.internvl_custom2hf import convert_keys_to_hf
from internvl.tools.internvl_custom2hf import main as custom2hf
from internvl.tools.internvl_hf2custom import convert_keys_back
from internvl.tools.internvl_hf2custom import main as hf2custom

CASES = {llm: {"llm": llm} for llm in TINY_LLMS}
CASES["6B"] = {"vit": "6B", "select_layer": -2}
CASES["first_layers"] = {"select_layer": 1, "force_image_size": 112}


def load_weights(folder) -> dict:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(actual: dict, expected: dict):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.fixture
def folders(tmp_path, goldens):
    """Return paths for custom, hf and back, and the tokenizer's path."""
    return tmp_path / "custom", tmp_path / "hf", tmp_path / "back", goldens / "tokenizer"


def convert(tool, **paths):
    tool([arg for name, path in paths.items() for arg in (f"--{name}", str(path))])


def compute_logits(model, tokenizer, pixel_values, num_image_tokens: int):
    text = "Look: <img>" + "<IMG_CONTEXT>" * num_image_tokens + "</img> what is it?"
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        with_image = model(input_ids=ids, pixel_values=pixel_values).logits
        return with_image, model(input_ids=ids[:, -5:], pixel_values=None).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_are_equal_and_the_round_trip_is_exact(case, folders):
    custom, hf, back, tokenizer_path = folders
    model = make_tiny_checkpoint(custom, tokenizer_path, **CASES[case])
    convert(custom2hf, custom_path=custom, save_path=hf)
    native = AutoModelForImageTextToText.from_pretrained(hf).eval()
    assert not native.config.tie_word_embeddings

    tokenizer = load_tokenizer(custom)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    side = model.config.force_image_size
    inputs = tokenizer, torch.randn(2, 3, side, side), 2 * model.num_image_token
    for ours, theirs in zip(compute_logits(model, *inputs), compute_logits(native, *inputs), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)

    convert(hf2custom, hf_path=hf, save_path=back, custom_path=custom)
    assert_same_bits(load_weights(back), load_weights(custom))
    assert load_tokenizer(back).get_vocab() == tokenizer.get_vocab()


def test_internlm2_without_reference_becomes_a_llama(folders):
    custom, hf, back, tokenizer_path = folders
    model = make_tiny_checkpoint(custom, tokenizer_path, llm="internlm2_bias_linear")
    convert(custom2hf, custom_path=custom, save_path=hf)
    convert(hf2custom, hf_path=hf, save_path=back)
    again = InternVLChatModel.from_pretrained(back).eval()
    assert type(again.language_model).__name__ == "LlamaForCausalLM"
    tokenizer = load_tokenizer(back)
    assert tokenizer.get_vocab() == load_tokenizer(custom).get_vocab()
    again.img_context_token_id = model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    inputs = tokenizer, torch.randn(1, 3, 56, 56), model.num_image_token
    for before, after in zip(compute_logits(model, *inputs), compute_logits(again, *inputs), strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    for name in ("template", "use_thumbnail", "dynamic_image_size", "max_dynamic_patch", "force_image_size"):
        assert getattr(again.config, name) == getattr(model.config, name), name


def test_generation_settings_are_kept_and_all_end_tokens_joined(folders):
    custom, hf, back, tokenizer_path = folders
    make_tiny_checkpoint(custom, tokenizer_path)
    settings = {"eos_token_id": [2, 998], "do_sample": True, "top_p": 0.5, "_from_model_config": True}
    (custom / "generation_config.json").write_text(json.dumps(settings))
    convert(custom2hf, custom_path=custom, save_path=hf)
    saved = json.loads((hf / "generation_config.json").read_text())
    tokenizer = load_tokenizer(custom)
    assert saved.pop("transformers_version")
    assert saved == {
        "eos_token_id": [2, 998, tokenizer.convert_tokens_to_ids("<|im_end|>")],
        "do_sample": True,
        "top_p": 0.5,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.mark.parametrize("stored", ["twice", "once"])
def test_head_equal_to_the_embedding_is_tied_in_hf_only(stored, folders):
    custom, hf, back, tokenizer_path = folders
    model = make_tiny_checkpoint(custom, tokenizer_path)
    with torch.no_grad():
        model.language_model.lm_head.weight.copy_(model.get_input_embeddings().weight)
    model.save_pretrained(custom)
    expected = load_weights(custom)
    if stored == "once":
        corrupt_checkpoint(custom, tensors={"language_model.lm_head.weight": None}, tie_word_embeddings=True)
    convert(custom2hf, custom_path=custom, save_path=hf)
    native = AutoModelForImageTextToText.from_pretrained(hf)
    assert native.config.tie_word_embeddings and "lm_head.weight" not in load_weights(hf)
    assert native.lm_head.weight is native.get_input_embeddings().weight
    convert(hf2custom, hf_path=hf, save_path=back)
    assert_same_bits(load_weights(back), expected)


@pytest.mark.parametrize("llm", ["qwen2", "qwen3_moe"])
def test_checkpoint_saved_by_transformers_is_converted_exactly(llm, folders, capsys):
    """It has older key prefixes, several files and no `internvl_chat` fields."""
    custom, hf, back, tokenizer_path = folders
    make_tiny_checkpoint(custom, tokenizer_path, llm=llm)
    convert(custom2hf, custom_path=custom, save_path=hf)
    native = AutoModelForImageTextToText.from_pretrained(hf)
    (hf / "model.safetensors").unlink()
    del native.config.internvl_chat
    native.save_pretrained(hf, max_shard_size="200KB")
    assert len(list(hf.glob("*.safetensors"))) > 1
    convert(hf2custom, hf_path=hf, save_path=back)
    assert_same_bits(load_weights(back), load_weights(custom))
    assert "using internvl2_5 and 1 to 12 tiles" in capsys.readouterr().out


@pytest.mark.parametrize("file", REAL_CONFIGS, ids=lambda file: file.stem)
def test_all_tensors_of_published_models_are_mapped(file):
    config = InternVLChatConfig.from_pretrained(file)
    with torch.device("meta"):
        custom = InternVLChatModel(config).state_dict()
        native = InternVLForConditionalGeneration(convert_config_to_hf(config, 1, is_tied=False)).state_dict()
    shapes = {name: tensor.shape for name, tensor in convert_weights_to_hf(custom, config.llm_config)}
    assert shapes == {name: tensor.shape for name, tensor in native.items()}


def test_large_checkpoint_is_saved_in_several_files(folders):
    custom, hf, back, tokenizer_path = folders
    make_tiny_checkpoint(custom, tokenizer_path)
    state = load_weights(custom)
    for file in custom.glob("*.safetensors"):
        file.unlink()
    save_tensors(state.items(), custom, max_shard_bytes=30_000)
    sizes = [file.stat().st_size for file in custom.glob("model-*-of-*.safetensors")]
    largest = max(tensor.nbytes for tensor in state.values())
    assert len(sizes) > 3 and max(sizes) < 30_000 + largest
    assert_same_bits(dict(CheckpointTensors(custom)), state)
    InternVLChatModel.from_pretrained(custom)  # through the index


def test_reference_with_another_internlm2_is_an_error(folders):
    custom, hf, back, tokenizer_path = folders
    make_tiny_checkpoint(custom, tokenizer_path, llm="internlm2_bias_linear")
    convert(custom2hf, custom_path=custom, save_path=hf)
    config = json.loads((custom / "config.json").read_text())
    config["llm_config"]["rope_theta"] = 7.0
    (custom / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="differs from the reference's in rope_parameters"):
        convert(hf2custom, hf_path=hf, save_path=back, custom_path=custom)


def test_state_dicts_are_converted_without_files(folders):
    state = make_tiny_checkpoint(*folders[::3], vit="6B").state_dict()
    hf = convert_keys_to_hf(state)
    assert "model.vision_tower.encoder.layer.0.attention.q_norm.weight" in hf
    assert_same_bits(convert_keys_back(hf), state)
    older = {name.removeprefix("model."): tensor for name, tensor in hf.items()}
    older["language_model.lm_head.weight"] = older.pop("lm_head.weight")
    older = {name.replace("language_model.layers", "language_model.model.layers"): t for name, t in older.items()}
    assert_same_bits(convert_keys_back(older), state)


def test_reference_is_compared_with_the_result(folders, capsys):
    custom, hf, back, tokenizer_path = folders
    make_tiny_checkpoint(custom, tokenizer_path)
    convert(custom2hf, custom_path=custom, save_path=hf)
    state = load_file(hf / "model.safetensors")
    state["lm_head.weight"][0, 0] += 2.0
    save_file(state, hf / "model.safetensors", metadata={"format": "pt"})
    convert(custom2hf, custom_path=custom, hf_path=hf, save_path=back)
    printed = capsys.readouterr().out.splitlines()
    assert "lm_head.weight: 2" in printed
    assert f"L2 distance of {len(state)} common tensors: 2 (0 missing in one or of another shape)" in printed


def corrupt_checkpoint(custom, **changes):
    state = {**load_file(custom / "model.safetensors"), **changes.pop("tensors", {})}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(state, custom / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((custom / "config.json").read_text()) | changes
    (custom / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ps_version": "v1"}, "row by row"),
        ({"use_llm_lora": 4}, "do not match the model"),
        ({"tensors": {"mlp1.4.weight": torch.ones(2)}}, "1 tensors have no counterpart in the other format: mlp1.4"),
        ({"tensors": {"mlp1.3.bias": None}}, "missing.*multi_modal_projector.linear_2.bias"),
        ({"tensors": {"mlp1.3.bias": torch.ones(3)}}, "mismatched.*multi_modal_projector.linear_2.bias"),
    ],
)
def test_checkpoints_without_equivalent_are_errors(changes, message, folders):
    custom, hf, back, tokenizer_path = folders
    make_tiny_checkpoint(custom, tokenizer_path)
    corrupt_checkpoint(custom, **changes)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        convert(custom2hf, custom_path=custom, save_path=hf)
    assert not hf.exists()


def test_nothing_is_overwritten_and_incomplete_tensors_are_named(folders):
    custom, hf, back, tokenizer_path = folders
    make_tiny_checkpoint(custom, tokenizer_path)
    convert(custom2hf, custom_path=custom, save_path=hf)
    with pytest.raises(SystemExit, match="not empty"):
        convert(custom2hf, custom_path=custom, save_path=hf)
    with pytest.raises(SystemExit, match="has model_type 'internvl', expected 'internvl_chat'"):
        convert(custom2hf, custom_path=hf, save_path=back)
    with pytest.raises(SystemExit, match="no checkpoint"):
        convert(custom2hf, custom_path=back, save_path=back)
    corrupt_checkpoint(hf, tensors={"model.vision_tower.encoder.layer.1.attention.k_proj.weight": None})
    with pytest.raises(SystemExit, match=r"layer\.1\.attention\.q_proj\.weight"):
        convert(hf2custom, hf_path=hf, save_path=back)
    assert not back.exists()
