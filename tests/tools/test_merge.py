"""tools/merge_lora.py: the merged weight is the fp32 sum, rounded once; nothing broken is written; runs add up."""

import json

import pytest
import torch
from helpers.tiny_models import make, save_adapters
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tools.merge_lora import main as merge_lora

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.lora import LoraSettings, LoraTargets, add_adapters
from internvl.model.tokenizers.loading import load_tokenizer

LAYER = "language_model.model.layers.1.mlp.up_proj"


def merge(*words) -> dict[str, torch.Tensor]:
    """The weights it writes."""
    merge_lora(list(map(str, words)))
    return load_file(words[1] / "model.safetensors")


def factors(folder, layer: str = LAYER) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a layer, from a folder with both parts' adapters."""
    part, inside = layer.split(".", 1)
    state = load_file(folder / part / "adapter_model.safetensors")
    return tuple(state[f"base_model.model.{inside}.lora_{factor}.weight"] for factor in "AB")


@pytest.fixture
def adapted(tmp_path, goldens):
    """A checkpoint in fp32 with adapters of rank 2, alpha 4, in both parts; they also lie in `adapters/`."""
    model = make(tmp_path / "in", goldens / "tokenizer", use_backbone_lora=2, use_llm_lora=2)
    save_adapters(model, tmp_path / "in/adapters")
    (tmp_path / "in/preprocessor_config.json").write_text('{"crop_size": 56}')
    return tmp_path / "in"


@pytest.fixture
def runs(tmp_path, goldens):
    """A plain checkpoint, and two folders with adapters for it: of rank 2, and of rank 2 and only the LLM, rsLoRA."""
    make(tmp_path / "base", goldens / "tokenizer")
    torch.manual_seed(1)
    for name, parts in (("a", ("vision_model", "language_model")), ("b", ("language_model",))):
        model = InternVLChatModel.from_pretrained(tmp_path / "base")
        for part in parts:
            module = getattr(model, part)
            attention = "attn.qkv" if part == "vision_model" else "mlp.up_proj"
            wrapped = add_adapters(module, LoraSettings(2, 6), LoraTargets([attention]))
            if name == "b":
                wrapped.peft_config["default"].use_rslora = True
            for parameter in (p for n, p in wrapped.named_parameters() if "lora_" in n):
                torch.nn.init.normal_(parameter, std=0.1)
            wrapped.save_pretrained(tmp_path / name / part)
    return tmp_path / "base", tmp_path / "a", tmp_path / "b"


def test_only_runs_on_the_same_base_are_combined(tmp_path, goldens):
    for name in ("base", "other"):
        model = make(tmp_path / name, goldens / "tokenizer", llm="qwen2" if name == "base" else "qwen3")
        model.requires_grad_(False)
        model.wrap_backbone_lora(2, 4)
        model.base_checkpoint = describe_base_checkpoint(tmp_path / name)
        save_adapter_checkpoint(model, tmp_path / f"on_{name}", gather_trained_tensors(model))
        load_tokenizer(goldens / "tokenizer").save_pretrained(tmp_path / f"on_{name}")
    for start in ("base", "on_base"):
        merge(tmp_path / start, tmp_path / f"sum_{start}", "--adapter", f"{tmp_path / 'on_base'}=1")
        with pytest.raises(SystemExit, match="on_other was trained on another base: .* fingerprint"):
            merge(tmp_path / start, tmp_path / "no", "--adapter", f"{tmp_path / 'on_other'}=1")
    save_file({"mlp1.1.bias": torch.ones(2)}, tmp_path / "on_base/trained.safetensors")
    with pytest.raises(SystemExit, match="other trained tensors beside adapters"):
        merge(tmp_path / "base", tmp_path / "no", "--adapter", f"{tmp_path / 'on_base'}=1")


def test_the_sum_is_rounded_once_and_nothing_is_lost(adapted, tmp_path, capsys):
    before = load_file(adapted / "model.safetensors")
    for dtype in ("bfloat16", "float32"):
        after = merge(adapted, tmp_path / dtype, "--dtype", dtype)
        a, b = factors(adapted / "adapters")
        weight = before[LAYER.replace("language_model.", "language_model.base_model.model.") + ".base_layer.weight"]
        expected = (weight + 2.0 * b @ a).to(getattr(torch, dtype))
        assert after[f"{LAYER}.weight"].dtype == expected.dtype
        unequal = (after[f"{LAYER}.weight"] != expected).float().mean()
        assert unequal < 0.01  # sums in another order
        assert torch.equal(after["mlp1.1.weight"], before["mlp1.1.weight"].to(expected.dtype))
        assert not any("lora" in name for name in after)
        config = json.loads((tmp_path / dtype / "config.json").read_text())
        assert config["torch_dtype"] == dtype and config["use_llm_lora"] == config["use_backbone_lora"] == 0
        for file in ("preprocessor_config.json", "generation_config.json"):
            assert (tmp_path / dtype / file).read_text() == (adapted / file).read_text()
    rounded, exact = (text.splitlines() for text in capsys.readouterr().out.split("merged checkpoint: ")[1:])
    assert float(exact[2].split()[3]) < 1e-4 and exact[3].endswith("32 tokens generated greedily: the same")
    assert float(rounded[2].split()[3]) > 1e-4 and "rounding the merged weights to bfloat16 costs" in rounded[2]


def test_low_precision_adds_in_fp32(tmp_path, goldens):
    """Updates too small for bfloat16 to add one by one."""
    model = make(tmp_path / "in", goldens / "tokenizer", use_llm_lora=2).bfloat16()
    model.save_pretrained(tmp_path / "in")
    save_adapters(model, tmp_path / "in")
    before = load_file(tmp_path / "in/model.safetensors")
    after = merge(tmp_path / "in", tmp_path / "out")
    a, b = (factor.float() for factor in factors(tmp_path / "in"))
    weight = before[LAYER.replace("language_model.", "language_model.base_model.model.") + ".base_layer.weight"]
    expected = (weight.float() + 2.0 * b @ a).bfloat16()
    assert (after[f"{LAYER}.weight"] != expected).float().mean() < 0.01
    assert (
        weight + (2.0 * b.bfloat16() @ a.bfloat16()) != expected
    ).float().mean() > 0.05  # as it would be in bfloat16


@pytest.mark.parametrize(
    "name, value",
    [(f"{LAYER}.lora_A.default.weight", float("inf")), (f"{LAYER}.base_layer.weight", float("nan"))],
)
def test_what_is_not_finite_is_named_and_nothing_is_written(adapted, tmp_path, name, value):
    name = name.replace("language_model.", "language_model.base_model.model.")
    state = load_file(adapted / "model.safetensors")
    state[name].view(-1)[0] = value
    save_file(state, adapted / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=f"NaN or infinite numbers in 1 tensors: {name}"):
        merge(adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_gets_one_sentence(runs, adapted, tmp_path):
    base, one, _ = runs
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    for words, sentence in [
        ((base, tmp_path / "out"), "has no adapters, and no --adapter brings some"),
        ((adapted, tmp_path / "full"), "full is not empty"),
        ((base, tmp_path / "out", "--adapter", f"{base}=1"), "no adapters in .*base"),
        ((adapted, tmp_path / "out", "--dtype", "float16", "--weight", "1e9"), "the sum of weights and adapters in fl"),
    ]:
        with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
            merge(*words)
    file = one / "language_model/adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.7"): t for name, t in load_file(file).items()}, file)
    with pytest.raises(SystemExit, match="are not this model's: missing or unexpected .*layers"):
        merge(base, tmp_path / "out", "--adapter", f"{one}=1")
    assert not (tmp_path / "out").exists()


def test_updates_add_up_with_their_weights(runs, tmp_path):
    """`cat` is W + sum of weight * scale * B A, also where one part has one adapter and scales differ."""
    base, one, two = runs
    before = load_file(base / "model.safetensors")
    words = ["--adapter", f"{one}=0.5", "--adapter", f"{two}=-2", "--dtype", "float32"]
    after = merge(base, tmp_path / "out", *words)
    (a1, b1), (a2, b2) = factors(one), factors(two)
    expected = before[f"{LAYER}.weight"] + 0.5 * 3.0 * b1 @ a1 - 2 * 6 / 2**0.5 * b2 @ a2
    torch.testing.assert_close(after[f"{LAYER}.weight"], expected)
    vision = "vision_model.encoder.layers.0.attn.qkv"
    a, b = factors(one, vision)
    torch.testing.assert_close(after[f"{vision}.weight"], before[f"{vision}.weight"] + 0.5 * 3.0 * b @ a)
    others = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("up_proj" in name or "qkv" in name for name in others)


@pytest.mark.parametrize("method", ["svd", "linear", "ties", "dare_linear"])
def test_methods_are_pefts(runs, tmp_path, method):
    base, one, _ = runs
    model = InternVLChatModel.from_pretrained(base)
    llm = PeftModel.from_pretrained(model.language_model, one / "language_model", adapter_name="x")
    llm.load_adapter(one / "language_model", "y")
    torch.manual_seed(0)
    density = {"density": 0.5} if method in ("ties", "dare_linear") else {}
    llm.add_weighted_adapter(["x", "y"], [0.5, 0.25], "both", method, **density)
    llm.set_adapter("both")
    expected = llm.merge_and_unload().get_submodule(LAYER.removeprefix("language_model.")).weight

    words = ["--adapter", f"{one}=0.5", "--adapter", f"{one}=0.25", "--dtype", "float32", "--combination", method]
    torch.testing.assert_close(merge(base, tmp_path / "out", *words)[f"{LAYER}.weight"], expected)
