"""internvl/evaluation/checkpoint_settings.py: data flags, dtype and model of a checkpoint folder."""

import json
import shutil

import pytest
import torch
from helpers.tiny_models import make_tiny_checkpoint
from helpers.training_runs import TRAIN_ADAPTERS, run_training

from internvl.arguments.data import DataTrainingArguments
from internvl.constants import IMG_CONTEXT_TOKEN
from internvl.evaluation.checkpoint_settings import (
    build_data_arguments,
    find_chat_checkpoint,
    get_run_dtype,
    load_chat_model,
)
from internvl.model.auxiliary_files import build_preprocessor_config
from internvl.tools.internvl_custom2hf import main as custom2hf
from internvl.tools.merge_lora import main as merge_lora

FLAGS = {"conv_style": "Hermes-2", "max_seq_length": 300, "max_packed_tokens": 700, "dynamic_image_size": False}
FLAGS |= {"max_num_frame": 9, "num_images_expected": 5, "normalize_type": "siglip", "learning_rate": 0.1, "bf16": True}
RECORD = {"flags": FLAGS, "datasets": {}, "world_size": 1, "versions": {}, "base_model": None, "changes": []}


@pytest.fixture
def folder(goldens, tmp_path):
    """A checkpoint without `flags.json`: a published one, or merged."""
    make_tiny_checkpoint(tmp_path / "model", goldens / "tokenizer", min_dynamic_patch=2)
    return tmp_path / "model"


def write_json(file, content):
    file.write_text(json.dumps(content))


def test_without_flags_of_a_run_the_configuration_decides(folder):
    expected = DataTrainingArguments(
        conv_style="internvl2_5",
        force_image_size=56,
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=2,
        max_dynamic_patch=4,
    )
    assert build_data_arguments(folder) == expected
    assert get_run_dtype(folder) is None
    write_json(folder / "preprocessor_config.json", build_preprocessor_config(56, (0.5,) * 3, (0.5,) * 3))
    assert build_data_arguments(folder, "meta.json").normalize_type == "siglip"


def test_the_flags_of_a_run_decide(folder):
    write_json(folder / "flags.json", RECORD)
    data_args = build_data_arguments(folder, "meta.json")
    names = [name for name in FLAGS if name not in ("learning_rate", "bf16")]
    assert {name: getattr(data_args, name) for name in names} == {name: FLAGS[name] for name in names}
    assert data_args.meta_path == "meta.json" and data_args.force_image_size == 56


@pytest.mark.parametrize(
    "flags, dtype",
    [({"bf16": True}, torch.bfloat16), ({"lora_fp32": True}, torch.bfloat16), ({"fp16": True}, torch.float16)]
    + [({"bf16": False}, torch.float32)],
)
def test_weights_have_the_dtype_of_the_run(folder, flags, dtype):
    write_json(folder / "flags.json", RECORD | {"flags": flags})
    assert get_run_dtype(folder) == dtype
    model, tokenizer = load_chat_model(folder)
    assert model.dtype == dtype and not model.training
    assert model.img_context_token_id == tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    assert load_chat_model(folder, dtype=torch.float32)[0].dtype == torch.float32


DAMAGED_FLAGS = {
    "text as number": ({"max_seq_length": "many"}, "max_seq_length"),
    "list as number": ({"max_num_frame": [1]}, "max_num_frame"),
    "negative": ({"max_seq_length": -5}, "max_seq_length -5 is invalid"),
    "unknown template": ({"conv_style": "none-such"}, "conv_style none-such"),
    "unknown normalization": ({"normalize_type": "x"}, "normalize_type"),
    "no tiles": ({"max_dynamic_patch": 0}, "max_dynamic_patch 0 is invalid"),
    "flag as value": ({"conv_style": "--help"}, "conv_style --help"),
}


@pytest.mark.parametrize("flags, message", DAMAGED_FLAGS.values(), ids=DAMAGED_FLAGS)
def test_invalid_flags_are_reported_with_their_file(folder, flags, message):
    write_json(folder / "flags.json", RECORD | {"flags": flags})
    with pytest.raises(ValueError, match=r"flags.json is invalid: ") as info:
        build_data_arguments(folder, "meta.json")
    assert message in str(info.value) and "\n" not in str(info.value)


def test_an_unknown_mean_color_cannot_pad(folder):
    write_json(folder / "preprocessor_config.json", build_preprocessor_config(56, (0.1,) * 3, (0.2,) * 3))
    assert build_data_arguments(folder).normalize_type == "imagenet"  # a name only: pixels have the folder's statistics
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"pad2square": True})
    with pytest.raises(ValueError, match="images are padded with the mean color"):
        build_data_arguments(folder)


def test_folders_that_are_no_chat_checkpoint(folder, tmp_path):
    custom2hf(["--custom_path", str(folder), "--save_path", str(tmp_path / "hf")])
    with pytest.raises(ValueError, match=r"tools/internvl_hf2custom.py"):
        load_chat_model(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"config.json is missing"):
        load_chat_model(tmp_path)
    shutil.move(folder, tmp_path / "checkpoint-20")
    shutil.copytree(tmp_path / "checkpoint-20", tmp_path / "checkpoint-100")
    with pytest.raises(ValueError, match=r"only below it: pass .*checkpoint-100"):
        load_chat_model(tmp_path)


def test_a_checkpoint_on_the_hub_is_downloaded(folder, monkeypatch):
    assert find_chat_checkpoint(folder) == folder
    with pytest.raises(ValueError, match="the folder a/b/c does not exist"):
        find_chat_checkpoint("a/b/c")
    monkeypatch.chdir(folder.parent)
    assert str(find_chat_checkpoint("model")) == "model"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="the folder org/absent does not exist, and it cannot be downloaded from the hub"
    ):
        find_chat_checkpoint("org/absent")


@pytest.mark.e2e
def test_all_folders_of_a_run_are_loaded(tiny_inputs, tmp_path):
    """Adapters, their base and a merged checkpoint; the run has a full one with --save_full_model."""
    run_training(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, "--max_steps", "1", "--save_steps", "1")
    merge_lora([str(tmp_path / "out"), str(tmp_path / "merged"), "--dtype", "float32"])
    logits = []
    for folder in ("out", "out/checkpoint-1", "merged"):
        model, tokenizer = load_chat_model(tmp_path / folder)
        data_args = build_data_arguments(tmp_path / folder)
        assert (data_args.conv_style, data_args.max_dynamic_patch) == ("internvl2_5", 4)
        assert data_args.max_seq_length == (8192 if folder == "merged" else 512)
        with torch.no_grad():
            logits.append(model.language_model(input_ids=torch.tensor([[5, 6, 7]])).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)
    torch.testing.assert_close(logits[2], logits[0])
    base, _ = load_chat_model(tiny_inputs / "model")
    assert base.dtype == torch.float32 and build_data_arguments(tiny_inputs / "model").max_dynamic_patch
