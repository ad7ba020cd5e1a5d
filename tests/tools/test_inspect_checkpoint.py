"""tools/inspect_checkpoint.py: every kind of folder is called by its name, and no tensor is read."""

import json
import shutil

import pytest
from helpers.tiny_models import make, save_adapters
from safetensors.torch import load_file
from tools.export_adapters import main as export_adapters
from tools.inspect_checkpoint import describe, headers
from tools.inspect_checkpoint import main as inspect_checkpoint
from tools.internvl_custom2hf import main as custom2hf
from tools.merge_lora import main as merge_lora


@pytest.fixture(scope="module")
def folders(tmp_path_factory, goldens):
    """A folder of each kind, by name."""
    root = tmp_path_factory.mktemp("kinds")
    make(root / "full", goldens / "tokenizer")
    model = make(root / "full with adapters", goldens / "tokenizer", use_backbone_lora=2, use_llm_lora=4)
    save_adapters(model, root / "full with adapters/adapters")
    state = {"global_step": 6, "max_steps": 8, "epoch": 0.75}
    (root / "full with adapters/trainer_state.json").write_text(json.dumps(state))

    run = root / "adapters on a base"
    shutil.copytree(root / "full with adapters/adapters", run)
    config = json.loads((root / "full with adapters/config.json").read_text())
    settings = {
        "language_model": {"r": 4, "alpha": 8, "dropout": 0.0, "targets": [], "layers": None, "variant": "pissa"}
    }
    config |= {"base_model": {"path": "gone/base", "fingerprint": "abc"}, "lora_settings": settings}
    (run / "config.json").write_text(json.dumps(config))

    whole = str(root / "full with adapters")
    merge_lora([whole, str(root / "merged")])
    export_adapters([whole, str(root / "adapter of one model or part")])
    custom2hf(["--custom_path", str(root / "full"), "--save_path", str(root / "native")])
    return root


KINDS = ["full", "full with adapters", "adapters on a base", "merged", "adapter of one model or part", "native"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_folder_is_called_by_its_name(folders, kind, capsys):
    inspect_checkpoint([str(folders / kind)])
    printed = capsys.readouterr().out
    lines = dict(line.split("  ", 1) for line in printed.splitlines() if not line.startswith(" "))
    assert lines["kind"].strip() == kind
    if "of one" not in kind:
        assert lines["language model"].strip().endswith("2 layers of width 32")
        assert lines["template"].strip() == "internvl2_5"
    assert "opened with" in lines


def test_adapters_are_counted_once_with_rank_alpha_and_variant(folders):
    lines = describe(folders / "full with adapters")
    state = load_file(folders / "full with adapters/adapters/language_model/adapter_model.safetensors")
    numbers = sum(tensor.numel() for tensor in state.values())
    told = [value for name, value in lines if name == "language_model" and value.startswith("adapters")]
    assert told == [f"adapters: lora, rank 4, alpha 8: {numbers / 1000:.3g} k parameters, {numbers / 250:.3g} kB"]
    assert ("steps", "6 of 8, epoch 0.75") in lines
    upstream = folders / "upstream"
    shutil.copytree(folders / "full with adapters", upstream)
    shutil.rmtree(upstream / "adapters")
    assert [value for name, value in describe(upstream) if name == "language_model"][1:] == told


def test_an_absent_base_and_the_configs_own_settings_are_told(folders):
    lines = describe(folders / "adapters on a base")
    assert ("base", "gone/base (fingerprint abc), which is not here: name its place by base_model=") in lines
    assert any(value.startswith("adapters: pissa, rank 4, alpha 8: ") for _, value in lines)


def test_only_headers_are_read(folders, tmp_path):
    """A file whose numbers are a hole of the disk has the table of the whole one."""
    whole = folders / "full/model.safetensors"
    with whole.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
    with (tmp_path / "hollow.safetensors").open("wb") as file:
        file.write(size.to_bytes(8, "little") + header)
        file.truncate(whole.stat().st_size)
    assert headers(tmp_path / "hollow.safetensors") == headers(whole)


def test_what_is_no_checkpoint_gets_one_sentence(folders, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    for path, sentence in ((tmp_path / "nowhere", "there is no config.json"), (tmp_path / "bert", "of type 'bert'")):
        with pytest.raises(SystemExit, match=f"^error: .* is no checkpoint of a chat model: .*{sentence}"):
            inspect_checkpoint([str(path)])
    shutil.copytree(folders / "full", tmp_path / "cut")
    file = tmp_path / "cut/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SystemExit, match="^error: .*model.safetensors is no whole safetensors file"):
        inspect_checkpoint([str(tmp_path / "cut")])
