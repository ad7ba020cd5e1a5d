"""tools/export_adapters.py: PEFT on transformers' class and on ours equals the adapted model."""

import json
import shlex

import pytest
import torch
from helpers.lora_models import randomize_adapters
from helpers.tiny_models import make_tiny_checkpoint, save_part_adapters
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.lora import LoraSettings, LoraTargets, add_adapters
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.export_adapters import main as export_adapters
from internvl.tools.internvl_custom2hf import main as custom2hf

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


def build_inputs(model: InternVLChatModel, tokenizer_dir) -> dict[str, torch.Tensor]:
    tokenizer = load_tokenizer(tokenizer_dir)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    text = "Look: <img>" + "<IMG_CONTEXT>" * (2 * model.num_image_token) + "</img> what is it?"
    return {"input_ids": tokenizer(text, return_tensors="pt").input_ids, "pixel_values": torch.randn(2, 3, 56, 56)}


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

    inputs = build_inputs(model, tmp_path / "base")
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, peft_model(**inputs).logits
        with peft_model.disable_adapter():
            assert (peft_model(**inputs).logits - theirs).abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("llm, among_weights", [("qwen2", False), ("internlm2", True), ("internlm2", False)])
def test_peft_on_the_chat_class_equals_the_adapted_model(llm, among_weights, goldens, tmp_path, capsys):
    model = save_adapted_run(tmp_path, goldens, llm, among_weights)
    flags = ["--layout", "chat", "--write_base", str(tmp_path / "new_base"), "--with_remote_code"]
    export_adapters([str(tmp_path / "run"), str(tmp_path / "adapter"), *flags])
    output = capsys.readouterr().out
    # vLLM has no place for the projector's adapters.
    assert ("merged into it: mlp1" in output) == (not among_weights)
    assert f"vllm serve {tmp_path}/new_base --trust-remote-code --enable-lora --enable-tower-connector-lora" in output
    assert "--max-lora-rank 8" in output and "Note" not in output
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "new_base")
    base_config = json.loads((tmp_path / "new_base/config.json").read_text())
    assert base_config["use_llm_lora"] == 0 and base_config["auto_map"]["AutoModel"]

    state = load_file(tmp_path / "adapter/adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in state}
    own_layers = {name.replace("base_model.model.", "") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert layers == {name for name in own_layers if not name.startswith("mlp1")}
    base = InternVLChatModel.from_pretrained(tmp_path / "new_base").eval()
    inputs = build_inputs(model, tmp_path / "base")
    base.img_context_token_id = model.img_context_token_id
    with torch.no_grad():
        before = base(**inputs).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**inputs).logits
        torch.testing.assert_close(theirs, model(**inputs).logits, atol=2e-5, rtol=1e-5)
    assert (theirs - before).abs().max() > 0.1


def test_base_of_a_run_that_trained_other_weights(goldens, tmp_path, capsys):
    make_tiny_checkpoint(tmp_path / "base", goldens / "tokenizer")
    model = InternVLChatModel.from_pretrained(tmp_path / "base")
    model.base_checkpoint = describe_base_checkpoint(tmp_path / "base")
    model.wrap_llm_lora(4, 8)
    model.mlp1[1].weight.requires_grad = True
    randomize_adapters(model, std=0.1)
    model.mlp1[1].weight.data += 0.5
    model.config.max_dynamic_patch = 2
    save_adapter_checkpoint(model.eval(), tmp_path / "run", gather_trained_tensors(model))
    load_tokenizer(tmp_path / "base").save_pretrained(tmp_path / "run")
    export_adapters([str(tmp_path / "run"), str(tmp_path / "note"), "--layout", "chat"])
    output = capsys.readouterr().out
    assert "the run also trained other weights (trained.safetensors); max_dynamic_patch was 4 and is 2." in output
    assert "Pass --write_base DIR" in output and f"vllm serve {tmp_path}/base" in output

    flags = ["--layout", "chat", "--write_base", str(tmp_path / "new_base")]
    export_adapters([str(tmp_path / "run"), str(tmp_path / "adapter"), *flags])
    output = capsys.readouterr().out
    assert (
        output.count("Note") == output.count(f"Note: {tmp_path}/new_base has no code files, which vLLM requires") == 1
    )
    expected, written = (
        load_file(tmp_path / "base/model.safetensors"),
        load_file(tmp_path / "new_base/model.safetensors"),
    )
    expected["mlp1.1.weight"] += 0.5
    assert expected.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())
    assert json.loads((tmp_path / "new_base/config.json").read_text())["max_dynamic_patch"] == 2


def test_what_vllm_has_no_place_for_is_an_error(goldens, tmp_path):
    def export(name: str, change, *flags: str, **fields) -> str:
        make_tiny_checkpoint(tmp_path / name / "base", goldens / "tokenizer", **fields)
        model = InternVLChatModel.from_pretrained(tmp_path / name / "base")
        change(model)
        model.save_pretrained(tmp_path / name / "run")
        save_part_adapters(model, tmp_path / name / "run")
        with pytest.raises(SystemExit) as stop:
            export_adapters([str(tmp_path / name / "run"), str(tmp_path / name / "out"), "--layout", "chat", *flags])
        assert not (tmp_path / name / "out").exists()
        return str(stop.value.code)

    assert "does not adapt the projector: leave mlp1 out" in export("mlp1", lambda m: m.wrap_mlp_lora(2, 4))
    head = export("head", lambda m: m.wrap_llm_lora(2, 4, targets=["lm_head"]))
    assert head.startswith("error: vLLM does not adapt the LM head (lm_head) of Qwen2ForCausalLM")
    layer = export("layer", lambda m: m.wrap_backbone_lora(2, 4), select_layer=-2)
    assert layer == "error: vLLM serves only models with select_layer -1, got -2"
    assert "ranks up to 512, got 513" in export("rank", lambda m: m.wrap_llm_lora(513, 4))
    code = export("code", lambda m: m.wrap_llm_lora(2, 4), "--with_remote_code")
    assert code == "error: --with_remote_code writes into the base model: pass --write_base DIR, too"


@pytest.mark.parametrize("parts, is_noted", [(["vision_model"], True), (["language_model"], False)])
def test_hf_layout_says_what_vllm_does_not_adapt(parts, is_noted, goldens, tmp_path, capsys):
    save_adapted_run(tmp_path, goldens, "qwen2", among_weights=False)
    export_adapters([str(tmp_path / "run"), str(tmp_path / "adapter"), "--parts", *parts])
    output = capsys.readouterr().out
    assert ("Note: vLLM adapts only the LLM in this layout" in output) == is_noted
    assert ("vLLM: vllm serve HF_BASE --enable-lora --max-lora-rank 8" in output) != is_noted
    step = "HF_BASE is written by internvl convert to-hf --custom_path BASE --save_path HF_BASE"
    assert (step in output) != is_noted


@pytest.mark.parametrize("layout", ["chat", "hf"])
def test_printed_commands_are_quoted(layout, goldens, tmp_path, capsys):
    folder = tmp_path / "my run"
    save_adapted_run(folder, goldens, "qwen2", among_weights=False)
    flags = ["--layout", layout, "--parts", "language_model", "--write_base", f"{folder}/new base"]
    export_adapters([str(folder / "run"), str(folder / "the adapter"), *flags])
    lines = capsys.readouterr().out.splitlines()
    [serving] = [shlex.split(line) for line in lines if line.startswith("vLLM: vllm serve ")]
    assert serving[3] == (f"{folder}/new base" if layout == "chat" else "HF_BASE")
    assert serving[-1] == f"adapted={folder}/the adapter"
    if layout == "hf":
        [step] = [shlex.split(line) for line in lines if line.startswith("HF_BASE is written by ")]
        assert step[-4:] == ["--custom_path", f"{folder}/new base", "--save_path", "HF_BASE"]


@pytest.mark.parametrize("base", ["out", "out/base", ".", "x/../out", "link/base", "full"])
def test_paths_of_the_outputs_are_checked_first(base, goldens, tmp_path, monkeypatch):
    save_adapted_run(tmp_path, goldens, "qwen2", among_weights=False)
    (tmp_path / "run/model.safetensors").unlink()  # so that loading the model is another error
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    monkeypatch.chdir(tmp_path)
    message = f"the output folder out and --write_base {base} are the same or inside each other: choose two separate"
    if base == "full":
        message = "the output folder full is not empty"
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        export_adapters(["run", "out", "--write_base", base, "--parts", "language_model"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["chat", "hf"])
def test_image_settings_that_engines_ignore_are_noted(layout, goldens, tmp_path, capsys):
    save_adapted_run(tmp_path, goldens, "qwen2", among_weights=False)
    (tmp_path / "run/preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}')

    def export(name: str) -> str:
        flags = ["--layout", layout, "--parts", "language_model"]
        export_adapters([str(tmp_path / "run"), str(tmp_path / name), *flags])
        return capsys.readouterr().out

    normalization = "Note: vLLM 0.32 ignores image_mean [0.5, 0.5, 0.5] and image_std [1, 1, 1] "
    assert (normalization in export("one")) == (layout == "chat")
    file = tmp_path / "run/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad2square": True}))
    output = export("two")
    assert output.count("vLLM 0.32 ignores") == 1 and "pad2square True (it does not pad): its answers differ" in output
    assert (normalization in output) == (layout == "chat")


def test_export_of_the_llm_part_alone(goldens, tmp_path, capsys):
    save_adapted_run(tmp_path, goldens, "internlm2", among_weights=False)
    flags = ["--parts", "language_model", "--base", "org/native"]
    export_adapters([str(tmp_path / "run"), str(tmp_path / "adapter"), *flags])
    output = capsys.readouterr().out
    assert "the adapters of vision_model are not exported; the adapters of mlp1 are not exported" in output
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
