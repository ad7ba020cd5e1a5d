"""The files that a run writes besides weights, configuration and tokenizer: those of its base."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.base_files import (
    AUTO_MAP,
    CARD,
    CODE_FILES,
    GENERATION_CONFIG,
    PREPROCESSOR_CONFIG,
    SAVED_GENERATION_CONFIG,
    add_base_files,
    read_generation_config,
)
from helpers.training_runs import TRAIN_ADAPTERS, build_composition_flags, build_run_flags, prepare_trainer
from huggingface_hub import ModelCard

from internvl.checkpoint.manifest import MANIFEST_FILE, find_checkpoint_errors
from internvl.conversation import get_conv_template
from internvl.model.chat_template import build_jinja_chat_template
from internvl.model.internvl_chat import InternVLChatModel
from internvl.tools.merge_lora import main as merge_lora

CARRIED = {*CODE_FILES, "LICENSE", "NOTICE.txt", "README.md", "preprocessor_config.json", "generation_config.json"}
MODES = {
    "adapters only": TRAIN_ADAPTERS,
    "adapters in a full model": [*TRAIN_ADAPTERS, "--save_full_model", "True"],
    "full fine-tuning": [],
}


@pytest.fixture
def inputs(tiny_inputs, tmp_path, monkeypatch) -> Path:
    """Copy the inputs of a tiny run; their model has all files that published models have."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    shutil.copytree(tiny_inputs / "model", tmp_path / "inputs/model")
    shutil.copy(tiny_inputs / "meta.json", tmp_path / "inputs")
    add_base_files(tmp_path / "inputs/model")
    return tmp_path / "inputs"


def check_files(folder: Path) -> None:
    """Check the files of a checkpoint whose base has been removed or not."""
    assert {file.name for file in folder.iterdir()} >= CARRIED
    assert all((folder / name).read_text() == text for name, text in CODE_FILES.items())
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert read_generation_config(folder) == SAVED_GENERATION_CONFIG
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert (settings["size"], settings["unknown_setting"]) == (56, 1)
    assert settings["image_std"] != PREPROCESSOR_CONFIG["image_std"]  # of --normalize_type
    assert ModelCard.load(folder / "README.md").data.license_name == "qwen"


@pytest.mark.parametrize("mode", MODES)
def test_results_and_checkpoints_have_the_files_of_the_base(inputs, tmp_path, mode):
    output = tmp_path / "run"
    flags = [*build_run_flags(inputs, output), *MODES[mode], "--max_steps", "1", "--save_steps", "1"]
    trainer = prepare_trainer(flags)
    trainer.train()
    trainer.save_model()
    for folder in (output, output / "checkpoint-1"):
        check_files(folder)
    library = ModelCard.load(output / "README.md").data.library_name
    assert library == ("peft" if mode == "adapters only" else "transformers")
    # A user may edit or remove the card of a checkpoint and resume from it.
    assert "README.md" not in json.loads((output / "checkpoint-1" / MANIFEST_FILE).read_text())["files"]
    (output / "checkpoint-1/README.md").unlink()
    assert find_checkpoint_errors(output / "checkpoint-1") == []


def test_merging_needs_only_the_runs_folder_for_these_files(inputs, tmp_path):
    trainer = prepare_trainer([*build_run_flags(inputs, tmp_path / "run"), *TRAIN_ADAPTERS])
    trainer.save_model(str(tmp_path / "run"))
    for name in CARRIED:
        (inputs / "model" / name).unlink()
    merge_lora([str(tmp_path / "run"), str(tmp_path / "merged")])
    check_files(tmp_path / "merged")


def test_a_users_card_in_the_output_folder_is_kept(inputs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/README.md").write_text("mine")
    trainer = prepare_trainer([*build_run_flags(inputs, tmp_path / "run"), *TRAIN_ADAPTERS])
    trainer.save_model(str(tmp_path / "run"))
    assert (tmp_path / "run/README.md").read_text() == "mine"


def test_a_base_without_these_files(tiny_inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "run"), *TRAIN_ADAPTERS])
    trainer.save_model(str(tmp_path / "run"))
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names & CARRIED == {"README.md", "preprocessor_config.json", "generation_config.json"}
    assert "auto_map" not in json.loads((tmp_path / "run/config.json").read_text())


def test_a_composed_model_has_the_licences_of_its_parts_and_the_llms_settings(
    tiny_inputs, model_parts, tmp_path, monkeypatch
):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    parts = Path(shutil.copytree(model_parts, tmp_path / "parts"))
    for part in ("vit", "llm"):
        (parts / part / "LICENSE").write_text(f"of the {part}")
        (parts / part / "README.md").write_text(CARD)
        (parts / part / "modeling.py").write_text("raise SystemExit('run')\n")
    (parts / "llm/generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "run"), *build_composition_flags(parts)])
    trainer.save_model(str(tmp_path / "run"))
    assert (tmp_path / "run/LICENSE").read_text() == "of the vit"
    assert (tmp_path / "run/LICENSE.language_model").read_text() == "of the llm"
    assert not list((tmp_path / "run").glob("*.py"))
    assert read_generation_config(tmp_path / "run") == SAVED_GENERATION_CONFIG
    assert ModelCard.load(tmp_path / "run/README.md").data.license_name == "qwen"
    InternVLChatModel.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("mode", ["adapters only", "full fine-tuning"])
def test_the_tokenizer_has_the_chat_template_of_the_run(inputs, tmp_path, mode):
    (inputs / "model/chat_template.jinja").write_text("{{ 'of the base' }}")
    flags = [*build_run_flags(inputs, tmp_path / "run"), *MODES[mode], "--conv_style", "Hermes-2"]
    prepare_trainer(flags).save_model(str(tmp_path / "run"))
    stored = json.loads((tmp_path / "run/tokenizer_config.json").read_text())["chat_template"]
    assert stored == (tmp_path / "run/chat_template.jinja").read_text()
    assert stored == build_jinja_chat_template(get_conv_template("Hermes-2"))
