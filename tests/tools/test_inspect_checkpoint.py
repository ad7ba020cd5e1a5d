"""tools/inspect_checkpoint.py: all kinds of folders are recognized from headers alone."""

import json
import os
import shutil

import pytest
import torch
from helpers.tiny_models import make_tiny_checkpoint, save_part_adapters
from safetensors.torch import load_file, save_file

from internvl.tools.export_adapters import main as export_adapters
from internvl.tools.inspect_checkpoint import LOADERS, describe_checkpoint, read_tensor_headers
from internvl.tools.inspect_checkpoint import main as inspect_checkpoint
from internvl.tools.internvl_custom2hf import main as custom2hf
from internvl.tools.merge_lora import main as merge_lora


@pytest.fixture(scope="module")
def folders(tmp_path_factory, goldens):
    """Create a folder of each kind, named after its kind."""
    root = tmp_path_factory.mktemp("kinds")
    make_tiny_checkpoint(root / "full checkpoint", goldens / "tokenizer")
    adapted = root / "full checkpoint with adapters"
    model = make_tiny_checkpoint(adapted, goldens / "tokenizer", use_backbone_lora=2, use_llm_lora=4)
    save_part_adapters(model, adapted / "adapters")
    state = {"global_step": 6, "max_steps": 8, "epoch": 0.75}
    (adapted / "trainer_state.json").write_text(json.dumps(state))

    run = root / "adapter checkpoint"
    shutil.copytree(adapted / "adapters", run)
    config = json.loads((adapted / "config.json").read_text())
    settings = {
        "language_model": {"r": 4, "alpha": 8, "dropout": 0.0, "targets": [], "layers": None, "variant": "pissa"}
    }
    config |= {"base_model": {"path": "gone/base", "fingerprint": "abc"}, "lora_settings": settings}
    (run / "config.json").write_text(json.dumps(config))

    merge_lora([str(adapted), str(root / "merged checkpoint")])
    export_adapters([str(adapted), str(root / "PEFT adapter")])
    custom2hf(["--custom_path", str(root / "full checkpoint"), "--save_path", str(root / "HF checkpoint")])
    return root


@pytest.mark.parametrize("kind", LOADERS)
def test_kinds_are_recognized(folders, kind, capsys):
    inspect_checkpoint([str(folders / kind)])
    printed = capsys.readouterr().out
    values = dict(line.split(":", 1) for line in printed.splitlines() if not line.startswith(" "))
    assert values["Kind"].strip() == kind
    if kind != "PEFT adapter":
        assert values["LLM"].strip().endswith("2 layers, hidden size 32")
        assert values["Template"].strip() == "internvl2_5"
    assert "Load with" in values


def test_missing_files_are_listed(folders, tmp_path):
    missing = dict(describe_checkpoint(folders / "full checkpoint"))["Missing files"]
    assert missing == "preprocessor_config.json"
    assert "Missing files" not in dict(describe_checkpoint(folders / "HF checkpoint"))
    shutil.copytree(folders / "full checkpoint", tmp_path / "code")
    edit_json(tmp_path / "code", "config.json", auto_map={"AutoModel": "modeling_x.Model", "AutoConfig": "a/b--c.D"})
    assert dict(describe_checkpoint(tmp_path / "code"))["Missing files"].endswith(", 'modeling_x.py'")


def test_adapters_are_counted_once_with_rank_alpha_and_variant(folders):
    adapted = folders / "full checkpoint with adapters"
    rows = describe_checkpoint(adapted)
    state = load_file(adapted / "adapters/language_model/adapter_model.safetensors")
    num_parameters = sum(tensor.numel() for tensor in state.values())
    values = [value for label, value in rows if label == "language_model" and value.startswith("adapters")]
    size = f"{num_parameters / 1000:.3g} k parameters, {num_parameters / 250:.3g} kB"
    assert values == [f"adapters (lora, rank 4, alpha 8): {size}"]
    assert ("Step", "6 of 8 (epoch 0.75)") in rows
    upstream = folders / "upstream"  # adapters among the weights only
    shutil.copytree(adapted, upstream)
    shutil.rmtree(upstream / "adapters")
    assert [value for label, value in describe_checkpoint(upstream) if label == "language_model"][1:] == values


def test_missing_base_checkpoint_and_lora_settings_are_shown(folders):
    rows = describe_checkpoint(folders / "adapter checkpoint")
    base = "gone/base (fingerprint abc); not found: pass its new path as base_model="
    assert ("Base checkpoint", base) in rows
    assert any(value.startswith("adapters (pissa, rank 4, alpha 8): ") for _, value in rows)


def test_only_headers_are_read(folders, tmp_path):
    """A sparse file with the same header has the same table."""
    complete = folders / "full checkpoint/model.safetensors"
    with complete.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
    with (tmp_path / "sparse.safetensors").open("wb") as file:
        file.write(size.to_bytes(8, "little") + header)
        file.truncate(complete.stat().st_size)
    assert read_tensor_headers(tmp_path / "sparse.safetensors") == read_tensor_headers(complete)


def test_other_folders_are_errors_of_one_line(folders, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    messages = {"nowhere": "config.json is missing", "bert": "has model_type 'bert'"}
    for name, message in messages.items():
        with pytest.raises(SystemExit, match=f"^error: .* is not a checkpoint of a chat model: .*{message}"):
            inspect_checkpoint([str(tmp_path / name)])
    shutil.copytree(folders / "full checkpoint", tmp_path / "cut")
    file = tmp_path / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SystemExit, match="^error: .*model.safetensors is not a complete safetensors file"):
        inspect_checkpoint([str(tmp_path / "cut")])


def edit_json(folder, name, **fields):
    file = folder / name
    old = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(old | fields))


def replace_by_fifo(file):
    file.unlink(missing_ok=True)
    os.mkfifo(file)


# Damage of the folder "full checkpoint with adapters" -> the sentence.
DAMAGES = {
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object, got a JSON list"),
    "config is a FIFO": (lambda f: replace_by_fifo(f / "config.json"), "config.json is a FIFO"),
    "base is a text": (lambda f: edit_json(f, "config.json", base_model="x"), "base_model is 'x', expected a JSON obj"),
    "LLM is a list": (lambda f: edit_json(f, "config.json", llm_config=[1]), "llm_config is .1., expected a JSON obj"),
    "rank is a text": (lambda f: edit_json(f, "config.json", use_llm_lora="4"), "use_llm_lora is '4', expected an int"),
    "step is a text": (lambda f: edit_json(f, "trainer_state.json", global_step="6"), "global_step is '6', expected"),
    "adapter of another type": (
        lambda f: edit_json(f, "adapters/vision_model/adapter_config.json", peft_type="XLORA"),
        "its type is 'XLORA'",
    ),
    "negative rank": (lambda f: edit_json(f, "adapters/vision_model/adapter_config.json", r=-1), "r and rank_pattern"),
    "weights are a pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors is a pointer of Git LFS",
    ),
    "weights are empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a complete safetensors file"),
    "weights are a FIFO": (lambda f: replace_by_fifo(f / "model.safetensors"), "model.safetensors is a FIFO"),
}


@pytest.mark.parametrize(("damage_fn", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints_are_errors_of_one_line(folders, tmp_path, damage_fn, message):
    folder = tmp_path / "damaged"
    shutil.copytree(folders / "full checkpoint with adapters", folder)
    damage_fn(folder)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        inspect_checkpoint([str(folder)])
    assert len(str(caught.value).splitlines()) == 1


def test_optimizer_states_are_no_weights(folders, tmp_path):
    folder = shutil.copytree(folders / "adapter checkpoint", tmp_path / "checkpoint-6")
    expected = describe_checkpoint(folder)
    save_file({"mlp1.0.weight.fp32": torch.zeros(9)}, folder / "optimizer.safetensors")
    assert describe_checkpoint(folder) == expected
