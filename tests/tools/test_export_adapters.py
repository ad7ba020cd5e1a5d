"""tools/export_adapters.py: PEFT on transformers' class equals our adapted model."""

import json

import pytest
import torch
from helpers.lora_models import randomize_adapters
from helpers.tiny_models import make_tiny_checkpoint, save_part_adapters
from peft import PeftModel
from safetensors.torch import load_file
from tools.export_adapters import main as export_adapters
from tools.internvl_custom2hf import main as custom2hf
from transformers import AutoModelForImageTextToText

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.lora import LoraSettings, LoraTargets, add_adapters
from internvl.model.tokenizers.loading import load_tokenizer

PARTS = {"vision_model": (2, 4), "mlp1": (3, 3), "language_model": (4, 6)}  # different ranks and alphas


def save_adapted_run(folder, goldens, llm: str, among_weights: bool):
    """Save a base checkpoint and a run; return the adapted model.

    Args:
        among_weights: upstream's layout, with adapters in model.safetensors and alpha twice the rank.
    """
    make_tiny_checkpoint(folder / "base", goldens / "tokenizer", llm=llm)
    model = InternVLChatModel.from_pretrained(folder / "base")
    if among_weights:
        model.config.use_backbone_lora, model.config.use_llm_lora = 2, 4
        model.wrap_backbone_lora(2, 4)
        model.wrap_llm_lora(4, 8)
    else:
        for part, (r, alpha) in PARTS.items():
            model.add_part_adapters(part, LoraSettings(r, alpha))
    randomize_adapters(model, std=0.1)
    model.eval().save_pretrained(folder / "run")
    load_tokenizer(folder / "base").save_pretrained(folder / "run")
    if not among_weights:
        save_part_adapters(model, folder / "run")
    return model


@pytest.mark.parametrize(
    "llm, among_weights",
    [("qwen2", False), ("qwen2", True), ("internlm2", False), ("internlm2", True), ("phi3_su", False)],
)
def test_peft_on_transformers_class_equals_the_adapted_model(llm, among_weights, goldens, tmp_path):
    model = save_adapted_run(tmp_path, goldens, llm, among_weights)
    export_adapters([str(tmp_path / "run"), str(tmp_path / "adapter")])
    custom2hf(["--custom_path", str(tmp_path / "base"), "--save_path", str(tmp_path / "native")])
    native = AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    peft_model = PeftModel.from_pretrained(native, tmp_path / "adapter").eval()
    state = load_file(tmp_path / "adapter/adapter_model.safetensors")
    loaded = {name for name, _ in peft_model.named_parameters() if "lora_" in name}
    assert {name.replace(".default", "") for name in loaded} == state.keys()

    tokenizer = load_tokenizer(tmp_path / "base")
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    text = "Look: <img>" + "<IMG_CONTEXT>" * (2 * model.num_image_token) + "</img> what is it?"
    inputs = {"input_ids": tokenizer(text, return_tensors="pt").input_ids, "pixel_values": torch.randn(2, 3, 56, 56)}
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, peft_model(**inputs).logits
        with peft_model.disable_adapter():
            assert (peft_model(**inputs).logits - theirs).abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-5)


def test_export_of_the_llm_part_alone(goldens, tmp_path, capsys):
    save_adapted_run(tmp_path, goldens, "internlm2", among_weights=False)
    flags = ["--parts", "language_model", "--base", "org/native"]
    export_adapters([str(tmp_path / "run"), str(tmp_path / "adapter"), *flags])
    assert "adapters not exported: vision_model, mlp1" in capsys.readouterr().out
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6, "org/native")
    assert sorted(config["target_modules"]) == sorted("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    assert {name.split(".")[-2] for name in names} == {"lora_A", "lora_B"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "language_model has use_dora: serving engines support lora_A and lora_B only"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "has target_parameters"),
    ],
)
def test_unsupported_variants_are_errors(change, message, goldens, tmp_path):
    save_adapted_run(tmp_path, goldens, "qwen2", among_weights=False)
    file = tmp_path / "run/language_model/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        export_adapters([str(tmp_path / "run"), str(tmp_path / "adapter")])
    assert not (tmp_path / "adapter").exists()


def test_export_without_adapters_is_an_error(goldens, tmp_path):
    make_tiny_checkpoint(tmp_path / "base", goldens / "tokenizer")
    with pytest.raises(SystemExit, match="has no adapters of vision_model, mlp1, language_model"):
        export_adapters([str(tmp_path / "base"), str(tmp_path / "adapter")])
    model = InternVLChatModel.from_pretrained(tmp_path / "base")
    add_adapters(model.vision_model, LoraSettings(2, 4), LoraTargets(["attn.qkv"])).save_pretrained(
        tmp_path / "base/vision_model"
    )
    with pytest.raises(SystemExit, match="has no adapters of language_model"):
        export_adapters([str(tmp_path / "base"), str(tmp_path / "adapter"), "--parts", "language_model"])
