"""tools/merge_lora.py: merging one run's adapters, and combining those of several runs."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.lora_models import randomize_adapters
from helpers.paths import PACKAGE_DIR
from helpers.tiny_models import make_tiny_checkpoint, save_part_adapters
from peft import PeftModel
from safetensors.torch import load_file, save_file

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.lora import LoraSettings, LoraTargets, add_adapters
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.merge_lora import main as merge_lora

LAYER = "language_model.model.layers.1.mlp.up_proj"


def merge(*args) -> dict[str, torch.Tensor]:
    """Run the tool and return the merged weights."""
    merge_lora(list(map(str, args)))
    return load_file(args[1] / "model.safetensors")


def load_factors(folder, layer: str = LAYER) -> tuple[torch.Tensor, torch.Tensor]:
    """Load A (r, in) and B (out, r) of a layer."""
    part, name = layer.split(".", 1)
    state = load_file(folder / part / "adapter_model.safetensors")
    return tuple(state[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")


@pytest.fixture
def adapted(tmp_path, goldens):
    """Save a float32 checkpoint with adapters.

    Rank 2, alpha 4, in both parts, among the weights and in `adapters/`.
    """
    model = make_tiny_checkpoint(tmp_path / "in", goldens / "tokenizer", use_backbone_lora=2, use_llm_lora=2)
    save_part_adapters(model, tmp_path / "in/adapters")
    (tmp_path / "in/preprocessor_config.json").write_text('{"crop_size": 56}')
    return tmp_path / "in"


@pytest.fixture
def runs(tmp_path, goldens):
    """Save a base checkpoint and two folders with adapters.

    The first has LoRA in both parts, the second rsLoRA in the LLM.
    """
    make_tiny_checkpoint(tmp_path / "base", goldens / "tokenizer")
    for name, parts in (("a", ("vision_model", "language_model")), ("b", ("language_model",))):
        model = InternVLChatModel.from_pretrained(tmp_path / "base")
        for part in parts:
            module = getattr(model, part)
            target = "attn.qkv" if part == "vision_model" else "mlp.up_proj"
            peft_model = add_adapters(module, LoraSettings(2, 6), LoraTargets([target]))
            if name == "b":
                peft_model.peft_config["default"].use_rslora = True
            randomize_adapters(peft_model, std=0.1)
            peft_model.save_pretrained(tmp_path / name / part)
    return tmp_path / "base", tmp_path / "a", tmp_path / "b"


def test_combining_requires_the_same_base_checkpoint(tmp_path, goldens):
    for name in ("base", "other"):
        model = make_tiny_checkpoint(tmp_path / name, goldens / "tokenizer", llm="qwen2" if name == "base" else "qwen3")
        model.requires_grad_(False)
        model.wrap_backbone_lora(2, 4)
        model.base_checkpoint = describe_base_checkpoint(tmp_path / name)
        save_adapter_checkpoint(model, tmp_path / f"on_{name}", gather_trained_tensors(model))
        load_tokenizer(goldens / "tokenizer").save_pretrained(tmp_path / f"on_{name}")
    for start in ("base", "on_base"):
        merge(tmp_path / start, tmp_path / f"sum_{start}", "--adapter", f"{tmp_path / 'on_base'}=1")
        with pytest.raises(SystemExit, match="on_other was trained on another base checkpoint: .* fingerprint"):
            merge(tmp_path / start, tmp_path / "no", "--adapter", f"{tmp_path / 'on_other'}=1")
    save_file({"mlp1.1.bias": torch.ones(2)}, tmp_path / "on_base/trained.safetensors")
    with pytest.raises(SystemExit, match="other trained tensors beside adapters"):
        merge(tmp_path / "base", tmp_path / "no", "--adapter", f"{tmp_path / 'on_base'}=1")


def test_merged_weights_are_rounded_once_and_files_are_copied(adapted, tmp_path, capsys):
    before = load_file(adapted / "model.safetensors")
    for dtype in ("bfloat16", "float32"):
        after = merge(adapted, tmp_path / dtype, "--dtype", dtype)
        a, b = load_factors(adapted / "adapters")
        weight = before[LAYER.replace("language_model.", "language_model.base_model.model.") + ".base_layer.weight"]
        expected = (weight + 2.0 * b @ a).to(getattr(torch, dtype))
        assert after[f"{LAYER}.weight"].dtype == expected.dtype
        unequal = (after[f"{LAYER}.weight"] != expected).float().mean()
        assert unequal < 0.01  # the order of summation differs
        assert torch.equal(after["mlp1.1.weight"], before["mlp1.1.weight"].to(expected.dtype))
        assert not any("lora" in name for name in after)
        config = json.loads((tmp_path / dtype / "config.json").read_text())
        assert config["torch_dtype"] == dtype and config["use_llm_lora"] == config["use_backbone_lora"] == 0
        file = "preprocessor_config.json"
        assert (tmp_path / dtype / file).read_text() == (adapted / file).read_text()
        settings = json.loads((tmp_path / dtype / "generation_config.json").read_text())
        expected = json.loads((adapted / "generation_config.json").read_text()) | {"eos_token_id": [2, 999]}
        assert settings == expected  # with the template's end mark
    rounded, exact = (text.splitlines() for text in capsys.readouterr().out.split("Merged checkpoint: ")[1:])
    assert float(exact[2].split()[3]) < 1e-4 and exact[3].endswith("Generated tokens: 32, identical")
    assert float(rounded[2].split()[3].strip(",")) > 1e-4
    assert "due to rounding the merged weights to bfloat16" in rounded[2]


def test_bfloat16_weights_are_merged_in_float32(tmp_path, goldens):
    """Adding in bfloat16 would lose small values of the adapters."""
    model = make_tiny_checkpoint(tmp_path / "in", goldens / "tokenizer", use_llm_lora=2).bfloat16()
    model.save_pretrained(tmp_path / "in")
    save_part_adapters(model, tmp_path / "in")
    before = load_file(tmp_path / "in/model.safetensors")
    after = merge(tmp_path / "in", tmp_path / "out")
    a, b = (factor.float() for factor in load_factors(tmp_path / "in"))
    weight = before[LAYER.replace("language_model.", "language_model.base_model.model.") + ".base_layer.weight"]
    expected = (weight.float() + 2.0 * b @ a).bfloat16()
    assert (after[f"{LAYER}.weight"] != expected).float().mean() < 0.01
    assert (weight + (2.0 * b.bfloat16() @ a.bfloat16()) != expected).float().mean() > 0.05  # the sum in bfloat16


@pytest.mark.parametrize(
    "name, value",
    [(f"{LAYER}.lora_A.default.weight", float("inf")), (f"{LAYER}.base_layer.weight", float("nan"))],
)
def test_non_finite_tensors_are_named_and_nothing_is_written(adapted, tmp_path, name, value):
    name = name.replace("language_model.", "language_model.base_model.model.")
    state = load_file(adapted / "model.safetensors")
    state[name].view(-1)[0] = value
    save_file(state, adapted / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=rf"non-finite values \(NaN or infinity\) in 1 tensors: {name}"):
        merge(adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsupported_merges_are_errors_of_one_line(runs, adapted, tmp_path):
    base, one, _ = runs
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    for args, message in [
        ((base, tmp_path / "out"), "has no adapters: add some with --adapter"),
        ((adapted, tmp_path / "full"), "full is not empty"),
        ((base, tmp_path / "out", "--adapter", f"{base}=1"), "no adapters in .*base"),
        ((adapted, tmp_path / "out", "--dtype", "float16", "--weight", "1e9"), "merged weights in float16: non-finite"),
    ]:
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            merge(*args)
    file = one / "language_model/adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.7"): t for name, t in load_file(file).items()}, file)
    with pytest.raises(SystemExit, match="do not fit this model: missing or unexpected .*layers"):
        merge(base, tmp_path / "out", "--adapter", f"{one}=1")
    assert not (tmp_path / "out").exists()


def test_cat_is_the_exact_weighted_sum(runs, tmp_path):
    """Expect W + sum of weight * scale * B A.

    Scales differ, and one run has no adapter of the vision encoder.
    """
    base, one, two = runs
    before = load_file(base / "model.safetensors")
    args = ["--adapter", f"{one}=0.5", "--adapter", f"{two}=-2", "--dtype", "float32"]
    after = merge(base, tmp_path / "out", *args)
    (a1, b1), (a2, b2) = load_factors(one), load_factors(two)
    expected = before[f"{LAYER}.weight"] + 0.5 * 3.0 * b1 @ a1 - 2 * 6 / 2**0.5 * b2 @ a2
    torch.testing.assert_close(after[f"{LAYER}.weight"], expected)
    vision = "vision_model.encoder.layers.0.attn.qkv"
    a, b = load_factors(one, vision)
    torch.testing.assert_close(after[f"{vision}.weight"], before[f"{vision}.weight"] + 0.5 * 3.0 * b @ a)
    others = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("up_proj" in name or "qkv" in name for name in others)


@pytest.mark.parametrize("method", ["svd", "linear", "ties", "dare_linear"])
def test_combination_methods_equal_pefts(runs, tmp_path, method):
    base, one, _ = runs
    model = InternVLChatModel.from_pretrained(base)
    llm = PeftModel.from_pretrained(model.language_model, one / "language_model", adapter_name="x")
    llm.load_adapter(one / "language_model", "y")
    torch.manual_seed(0)
    density = {"density": 0.5} if method in ("ties", "dare_linear") else {}
    llm.add_weighted_adapter(["x", "y"], [0.5, 0.25], "both", method, **density)
    llm.set_adapter("both")
    expected = llm.merge_and_unload().get_submodule(LAYER.removeprefix("language_model.")).weight

    args = ["--adapter", f"{one}=0.5", "--adapter", f"{one}=0.25", "--dtype", "float32", "--combination", method]
    torch.testing.assert_close(merge(base, tmp_path / "out", *args)[f"{LAYER}.weight"], expected)


@pytest.mark.multiprocess
def test_the_program_prints_results_and_no_notices_of_libraries(adapted, tmp_path):
    """Neither DeepSpeed's missing GPU nor deprecations of transformers."""
    env = {"PYTHONPATH": str(PACKAGE_DIR), "PATH": "", "OMP_NUM_THREADS": "1"}

    def run(*args) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/merge_lora.py", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE_DIR, env=env)

    done = run(adapted, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Merged checkpoint: ") and done.stdout.count("\n") == 4, done.stdout
    assert "Warning" not in done.stderr and "WARNING" not in done.stderr
    model = InternVLChatModel.from_pretrained(tmp_path / "out")
    assert model.config.use_backbone_lora == 0 and model.dtype == torch.bfloat16
    assert len(load_tokenizer(tmp_path / "out")) == len(load_tokenizer(adapted))
    repeated = run(tmp_path / "out", adapted)
    assert repeated.returncode == 1 and "has no adapters" in repeated.stderr
