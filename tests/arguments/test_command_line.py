"""The command line: upstream's flags, flags that transformers removed, DeepSpeed files."""

import json
from dataclasses import fields

import pytest

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.deepspeed_config import ZERO_CONFIG_DIR
from internvl.arguments.model import ModelArguments
from internvl.arguments.per_part import LoraArguments
from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_data_arguments

MODEL_DEFAULTS = {
    "model_name_or_path": None,
    "vision_path": None,
    "llm_path": None,
    "mlp_path": None,
    "freeze_llm": False,
    "freeze_backbone": False,
    "freeze_mlp": False,
    "unfreeze_vit_layers": 0,
    "vision_select_layer": -1,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "unfreeze_lm_head": False,
    "grad_checkpoint": True,
    "drop_path_rate": 0.0,
    "ps_version": "v2",
    "use_fast_tokenizer": False,
    "use_liger": False,
    "use_custom_flash_attn": False,
}
DATA_DEFAULTS = {
    "max_seq_length": 8192,
    "force_image_size": 448,
    "down_sample_ratio": 0.5,
    "pad2square": False,
    "conv_style": "internlm2-chat",
    "meta_path": None,
    "use_data_resampling": False,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "min_num_frame": 8,
    "max_num_frame": 32,
    "normalize_type": "imagenet",
    "use_packed_ds": False,
    "num_images_expected": 40,
    "max_packed_tokens": 8192,
    "max_buffer_size": 20,
    "log_freq": 1000,
    "strict_mode": True,
    "replacement": False,
    "allow_overflow": False,
    "loss_reduction": "token",
    "loss_reduction_all_gather": False,
    "split_annotations": False,
}
OWN_FLAGS = {
    "accept_changed_data",
    "store_retry_seconds",
    "allow_outside_root",
    "allow_pickle",
    "image_background",
    "max_image_pixels",
    "upstream_image_decoding",
    "train_new_tokens",
    "keep_surplus_placeholders",
    "max_bad_samples",
    "merge_before_training",
    "use_mlp_lora",
    "quantize_backbone",
    "quantize_llm",
    "vit_grad_checkpoint",
    "grad_checkpoint_ratio",
    "grad_checkpoint_keep",
    "compile",
}
OWN_FLAGS |= {field.name for field in fields(LoraArguments)}


@pytest.mark.parametrize(
    ("arguments", "defaults"), [(ModelArguments, MODEL_DEFAULTS), (DataTrainingArguments, DATA_DEFAULTS)]
)
def test_flags_and_defaults_equal_upstreams(arguments, defaults):
    assert {f.name: f.default for f in fields(arguments) if f.name not in OWN_FLAGS} == defaults


def parse(tmp_path, *flags):
    return parse_args(["--output_dir", str(tmp_path), *flags])


def test_flags_removed_by_transformers_5_still_work(tmp_path):
    flags = "--evaluation_strategy no --overwrite_output_dir True --group_by_length True --warmup_ratio 0.25".split()
    _, _, training = parse(tmp_path, *flags)
    assert training.eval_strategy == "no"
    assert training.overwrite_output_dir
    assert training.group_by_length
    assert training.get_warmup_steps(1000) == 250


def test_former_name_of_the_strategy_does_not_hide_the_new_one(tmp_path):
    recipe = ["--evaluation_strategy", "no"]
    assert parse(tmp_path, *recipe, "--eval_strategy", "steps")[2].eval_strategy == "steps"
    assert parse(tmp_path, "--evaluation_strategy", "epoch")[2].eval_strategy == "epoch"
    with pytest.raises(ValueError, match="^--evaluation_strategy epoch contradicts --eval_strategy steps: remove one"):
        parse(tmp_path, "--evaluation_strategy", "epoch", "--eval_strategy", "steps")


def test_last_of_repeated_flags_wins(tmp_path):
    model, _, training = parse(
        tmp_path, *"--use_llm_lora 16 --learning_rate 1e-4 --use_llm_lora 8 --learning_rate 3".split()
    )
    assert (model.use_llm_lora, training.learning_rate) == (8, 3)


def test_boolean_flags_take_all_upstream_forms(tmp_path):
    _, data, _ = parse(tmp_path, "--use_thumbnail", "--dynamic_image_size", "True", "--strict_mode", "False")
    assert (data.use_thumbnail, data.dynamic_image_size, data.strict_mode) == (True, True, False)
    assert not parse(tmp_path, "--no_strict_mode")[1].strict_mode


def test_json_file_of_arguments_is_parsed(tmp_path):
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"output_dir": str(tmp_path), "use_backbone_lora": 4}))
    assert parse_args([str(file)])[0].use_backbone_lora == 4


@pytest.mark.parametrize("name", [p.name for p in sorted(ZERO_CONFIG_DIR.glob("*.json"))])
def test_zero_configs_resolve_by_bare_name_from_any_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, training = parse(tmp_path, "--deepspeed", name, "--bf16", "True", "--gradient_accumulation_steps", "3")
    config = training.hf_deepspeed_config.config
    assert config["zero_optimization"]["stage"] == int(name.removeprefix("zero_stage")[0])
    assert config["bf16"]["enabled"] is True
    assert config["gradient_accumulation_steps"] == 3
    assert "optimizer" not in config, "the trainer builds AdamW, with a parameter group per part"


def test_number_of_zero_configs():
    assert len(list(ZERO_CONFIG_DIR.glob("*.json"))) == 8


INVALID = {
    "unknown ZeRO config": (["--deepspeed", "zero_stage9.json"], "zero_stage9.json: no such file"),
    "unknown flag": (["--no_such_flag", "3"], "unknown flag: --no_such_flag 3"),
    "abbreviation": (["--use_packed", "False"], "unknown flag: --use_packed False; did you mean --use_packed_ds?"),
    "a second value": (
        ["--max_steps", "3", "--report_to", "tensorboard", "3"],
        "^--report_to tensorboard 3: 3 belongs to no flag; a flag takes one value, and a list has commas: A,B.$",
    ),
    "a value after an equals sign": (
        ["--report_to=none", "wandb"],
        "^--report_to=none wandb: wandb belongs to no flag",
    ),
    "a negative second value": (["--learning_rate", "1", "-3"], "^--learning_rate 1 -3: -3 belongs to no flag"),
    "not a number": (["--learning_rate", "fast"], "--learning_rate.*: invalid float value: 'fast'"),
    "no output folder": (["--output_dir="], "^--output_dir is required"),
    "no template": (["--meta_path", "m", "--conv_style", ""], "^--conv_style '' is invalid: expected one of"),
    "unknown log level": (["--log_level", "loud"], "^--log_level loud is invalid: expected one of detail, debug, info"),
    "no pixels": (["--max_image_pixels", "0"], "--max_image_pixels 0 is invalid: expected an integer from 1"),
    "no color": (
        ["--meta_path", "m", "--image_background", "beigeish"],
        "image_background beigeish is invalid: expected a CSS color",
    ),
    "warmup ratio of 3": (["--warmup_ratio", "3"], r"--warmup_ratio 3.0 is invalid: expected a number in \[0, 1\)"),
}


@pytest.mark.parametrize(("flags", "message"), INVALID.values(), ids=INVALID)
def test_invalid_values_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        validate_data_arguments(parse(tmp_path, *flags)[1])
