"""What a changed flag does on resume: the table, the refusals, and the rates that act."""

import json
import platform
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    TRAIN_LLM_AND_PROJECTOR,
    ZERO_FLAGS,
    build_run_flags,
    load_weights,
    prepare_trainer,
    read_losses,
    read_step_logs,
    run_training,
)
from safetensors.torch import load_file, save_file

from internvl import __version__
from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.arguments.training import parse_args
from internvl.arguments.unsupported_flags import UNSUPPORTED
from internvl.checkpoint import resume_rules
from internvl.checkpoint.resume_rules import (
    DATASET_RULES,
    FLAGS_FILE,
    RULES,
    RunRecord,
    collect_flags,
    find_changes,
)
from internvl.data.schema import META_KEYS

FLAGS = [*TRAIN_ADAPTERS, "--weight_decay", "0", "--save_steps", "3"]
ADAPTERS = ("vision_model/adapter_model.safetensors", "language_model/adapter_model.safetensors")


# Flags of some supported versions of transformers.
FLAGS_OF_SOME_VERSIONS = set(
    "logging_dir ddp_static_graph trackio_bucket_id trackio_static_space_id dataloader_multiprocessing_context "
    "activation_checkpointing activation_checkpointing_kwargs".split()
)


def test_every_flag_has_one_rule():
    """A new flag must say what it does on resume: enter it in `_FLAGS_OF_RULES`."""
    declared = {field.name for cls in PREFERENCE_ARGUMENTS for field in fields(cls)} - UNSUPPORTED.keys()
    assert declared - RULES.keys() == set(), "flags without a rule"
    assert RULES.keys() - declared <= FLAGS_OF_SOME_VERSIONS, "rules of flags that do not exist"
    listed = " ".join(resume_rules._FLAGS_OF_RULES.values()).split()
    assert len(listed) == len(set(listed)), "a flag has two rules"


def test_flags_are_recorded_by_name_without_secrets(parse_flags):
    flags = collect_flags(*parse_flags("--hub_token", "secret", "--lr_scheduler_type", "cosine"))
    assert flags["lr_scheduler_type"] == "cosine"
    assert flags["learning_rate"] == 1e-3
    assert "secret" not in json.dumps(flags)
    assert find_changes(flags, collect_flags(*parse_flags("--lr_scheduler_type", "cosine"))) == {}


# -- settings of datasets ----------------------------------------------------------------------------------------------


def test_every_setting_of_a_dataset_has_one_rule():
    """A new setting must say what it does on resume: enter it in `DATASET_RULES`."""
    assert DATASET_RULES.keys() == META_KEYS.keys()


@pytest.fixture
def resume_with_settings(parse_flags, tiny_inputs, tmp_path):
    """Return a function that resumes a run whose meta entry has other settings."""
    RunRecord(*parse_flags()).save(tmp_path, None)

    def resume_with_settings(settings: dict, *flags: str, name: str = "tiny") -> RunRecord:
        [entry] = json.loads((tiny_inputs / "meta.json").read_text()).values()
        (tmp_path / "meta.json").write_text(json.dumps({name: entry | settings}))
        record = RunRecord(*parse_flags("--meta_path", str(tmp_path / "meta.json"), *flags))
        record.resume_from(tmp_path)
        return record

    return resume_with_settings


CHANGED_SETTINGS = {
    "data_augment False -> True": {"data_augment": True},
    "max_dynamic_patch 4 -> 2": {"max_dynamic_patch": 2},
    "repeat_time 1 -> 0.5": {"repeat_time": 0.5},
    "split train -> eval": {"split": "eval"},
}


@pytest.mark.parametrize("change", CHANGED_SETTINGS)
def test_settings_that_change_samples_must_be_accepted(resume_with_settings, tmp_path, caplog, change):
    caplog.set_level("INFO", "internvl")
    with pytest.raises(ValueError, match=f"dataset tiny: {change}. --accept_changed_data True resumes with the new"):
        resume_with_settings(CHANGED_SETTINGS[change])
    with pytest.raises(ValueError, match=f"dataset renamed: {change}"):
        resume_with_settings(CHANGED_SETTINGS[change], name="renamed")
    record = resume_with_settings(CHANGED_SETTINGS[change], "--accept_changed_data", "True")
    assert f"  dataset tiny: {change} (changed samples require --accept_changed_data True)" in caplog.text
    (name,) = CHANGED_SETTINGS[change]
    assert list(record.changes[0]["datasets"]) == [f"tiny: {name}"]
    record.save(tmp_path, None)
    resume_with_settings(CHANGED_SETTINGS[change])  # it is the checkpoint's now


def test_settings_of_evaluated_datasets_change_no_training_sample(resume_with_settings, tmp_path):
    resume_with_settings({"split": "eval"}, "--accept_changed_data", "True").save(tmp_path, None)
    resume_with_settings({"split": "eval", "repeat_time": 3, "data_augment": True, "max_dynamic_patch": 2})
    resume_with_settings({"split": "base_answers"})
    with pytest.raises(ValueError, match="dataset tiny: split eval -> train. --accept_changed_data True resumes"):
        resume_with_settings({})


def test_moved_files_and_explicit_defaults_are_accepted(resume_with_settings, caplog):
    caplog.set_level("INFO", "internvl")
    resume_with_settings({"max_dynamic_patch": 4, "data_augment": False, "length": 9, "split": "train"})
    resume_with_settings({"metric": "anls", "scorer": "internvl"})
    assert "dataset tiny" not in caplog.text
    resume_with_settings({"root": "s3://bucket/images"})
    assert "  dataset tiny: root /" in caplog.text
    assert "-> s3://bucket/images (files may have moved: samples are recognized by their records)" in caplog.text


@pytest.mark.multiprocess
def test_changed_augmentation_stops_the_program(tiny_inputs, finished_run, tmp_path):
    """Lengths and records are the same: only the setting tells."""
    output = start_at_checkpoint(finished_run, tmp_path / "out")
    meta = json.loads((tiny_inputs / "meta.json").read_text())
    meta["tiny"]["data_augment"] = True
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    changed = [*FLAGS, "--meta_path", str(tmp_path / "meta.json")]
    refused = run_training(tiny_inputs, output, *changed, status=1)
    assert "dataset tiny: data_augment False -> True" in refused.stderr
    run_training(tiny_inputs, output, *changed, "--accept_changed_data", "True")
    assert read_losses(output) != read_losses(finished_run)


# -- flags -------------------------------------------------------------------------------------------------------------


def copy_base(tiny_inputs: Path, folder: Path, scale: float = 1.0) -> Path:
    """Copy the base model, with its LLM's weights scaled."""
    shutil.copytree(tiny_inputs / "model", folder)
    (file,) = folder.glob("*.safetensors")
    tensors = {n: t * scale if n.startswith("language_model") else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def start_at_checkpoint(run: Path, folder: Path, step: int = 3) -> Path:
    """Copy a checkpoint into a new output folder."""
    shutil.copytree(run / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


@pytest.fixture(scope="module")
def finished_run(tiny_inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("rules") / "finished"
    run_training(tiny_inputs, output, *FLAGS)
    return output


REFUSED = {
    "--llm_lora_alpha 32": "--llm_lora_alpha 8 -> 32.0",
    "--llm_lora_variant rslora": "--llm_lora_variant lora -> rslora",
    "--backbone_lora_layers 0:1": "--backbone_lora_layers None -> [0, 1]",
    "--llm_lora_targets self_attn.q_proj": "--llm_lora_targets None -> ['self_attn.q_proj']",
    "--use_llm_lora 8": "--use_llm_lora 4 -> 8",
    "--use_mlp_lora 2": "--use_mlp_lora 0 -> 2",
    "--freeze_mlp False": "--freeze_mlp True -> False",
    "--unfreeze_lm_head True": "--unfreeze_lm_head False -> True",
    "--conv_style internlm2-chat": "--conv_style internvl2_5 -> internlm2-chat",
    "--force_image_size 112": "--force_image_size 56 -> 112",
    "--normalize_type siglip": "--normalize_type imagenet -> siglip",
    "--pad2square True": "--pad2square False -> True",
    "--bf16 True": "--bf16 False -> True",
    "--optim sgd": "--optim DEFAULT -> sgd",
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("flags", REFUSED)
def test_flag_that_must_match_is_refused(tiny_inputs, finished_run, tmp_path, monkeypatch, flags):
    """The message names both values and the way out; no step is trained."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    output = start_at_checkpoint(finished_run, tmp_path / "out")
    argv = [*build_run_flags(tiny_inputs, output), *FLAGS, *flags.split()]
    before = json.loads((output / "checkpoint-3" / FLAGS_FILE).read_text())["flags"]
    with pytest.raises(ValueError, match="not supported when resuming from .*--model_name_or_path") as error:
        RunRecord(*parse_args(argv)).resume_from(output / "checkpoint-3")
        prepare_trainer(argv).train(resume_from_checkpoint=str(output / "checkpoint-3"))
    # The default of --optim depends on the version of transformers.
    assert REFUSED[flags].replace("DEFAULT", before["optim"]) in str(error.value)


@pytest.mark.multiprocess
def test_explicit_defaults_of_adapters_are_accepted(tiny_inputs, finished_run, tmp_path):
    output = start_at_checkpoint(finished_run, tmp_path / "out")
    defaults = "--llm_lora_alpha 8 --backbone_lora_alpha 8 --llm_lora_variant lora --llm_lora_dropout 0.05".split()
    run_training(tiny_inputs, output, *FLAGS, *defaults)
    assert read_losses(output) == read_losses(finished_run)


def train_from_checkpoint(tiny_inputs: Path, run: Path, folder: Path, *flags: str) -> Path:
    run_training(tiny_inputs, start_at_checkpoint(run, folder), *flags)
    return folder


@pytest.mark.multiprocess
@pytest.mark.parametrize("strategy", ZERO_FLAGS)
def test_rates_of_the_command_line_act_on_resume(tiny_inputs, tmp_path, strategy):
    """Unchanged rates continue bit by bit. A rate of 0 changes no weight; weight decay shrinks each weight."""
    flags = [*FLAGS, *ZERO_FLAGS[strategy], "--lr_scheduler_type", "linear", "--warmup_steps", "2"]
    run = tmp_path / "unbroken"
    run_training(tiny_inputs, run, *flags)
    before, after = load_weights(run / "checkpoint-3"), load_weights(run)

    same = train_from_checkpoint(tiny_inputs, run, tmp_path / "same", *flags)
    assert read_losses(same) == read_losses(run)
    assert all(torch.equal(tensor, after[name]) for name, tensor in load_weights(same).items())
    rates = [entry["learning_rate"] for entry in read_step_logs(run)]
    assert [entry["learning_rate"] for entry in read_step_logs(same)] == rates

    still = train_from_checkpoint(tiny_inputs, run, tmp_path / "still", *flags, "--learning_rate", "0")
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_weights(still).items())
    assert [entry["learning_rate"] for entry in read_step_logs(still)] == [*rates[:3], 0, 0, 0]

    half = train_from_checkpoint(tiny_inputs, run, tmp_path / "half", *flags, "--learning_rate", "5e-4")
    expected = [*rates[:3], *(rate / 2 for rate in rates[3:])]
    assert [entry["learning_rate"] for entry in read_step_logs(half)] == pytest.approx(expected)
    settings = json.loads((half / "config.json").read_text())["training_settings"]
    assert settings["language_model"]["lr"] == 5e-4
    record = json.loads((half / FLAGS_FILE).read_text())
    assert record["flags"]["learning_rate"] == 5e-4
    assert record["changes"] == [{"from": "checkpoint-3", "flags": {"learning_rate": [1e-3, 5e-4]}}]

    # AdamW subtracts learning rate * weight decay * weight. `--llm_weight_decay` is for one part.
    one_step = ["--max_steps", "4", "--lr_scheduler_type", "constant"]
    plain = load_weights(train_from_checkpoint(tiny_inputs, run, tmp_path / "plain", *flags, *one_step))
    decay = ["--llm_weight_decay", "50"]
    shrunk = load_weights(train_from_checkpoint(tiny_inputs, run, tmp_path / "decay", *flags, *one_step, *decay))
    for name, tensor in before.items():
        if "lora_" in name:
            factor = 1e-3 * 50 if name.startswith("language_model") else 0
            torch.testing.assert_close(plain[name] - shrunk[name], factor * tensor, atol=1e-6, rtol=1e-4)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("trained", "strategy", "flag", "ratios"),
    [
        (TRAIN_ADAPTERS, "none", "--llm_loraplus_lr_ratio", ("1.0001", "4")),
        (TRAIN_ADAPTERS, "zero2", "--llm_loraplus_lr_ratio", ("1.0001", "4")),
        (["--freeze_llm", "True"], "none", "--backbone_layer_decay", ("0.9999", "0.1")),
        (["--freeze_llm", "True"], "zero1", "--backbone_layer_decay", ("0.9999", "0.1")),
        (["--freeze_llm", "True"], "zero3", "--backbone_layer_decay", ("0.9999", "0.1")),
    ],
    ids=["adapters", "adapters, ZeRO-2", "all weights", "all weights, ZeRO-1", "all weights, ZeRO-3"],
)
def test_rates_that_change_the_parameter_groups_act_on_resume(tiny_inputs, tmp_path, trained, strategy, flag, ratios):
    """The flag splits groups. With a ratio of almost 1 the losses are almost those of the unbroken run."""
    flags = [*trained, *ZERO_FLAGS[strategy], "--save_steps", "3"]
    run_training(tiny_inputs, tmp_path / "run", *flags)
    expected = read_losses(tmp_path / "run")
    for ratio in ratios:
        output = train_from_checkpoint(tiny_inputs, tmp_path / "run", tmp_path / ratio, *flags, flag, ratio)
        is_close = torch.allclose(torch.tensor(read_losses(output)), torch.tensor(expected), atol=1e-4)
        assert is_close == (ratio == ratios[0])
        # And back to one group.
        run_training(
            tiny_inputs, start_at_checkpoint(output, tmp_path / f"{ratio}_and_back", 6), *flags, "--max_steps", "7"
        )


@pytest.mark.multiprocess
def test_differences_are_printed(tiny_inputs, finished_run, tmp_path):
    output = start_at_checkpoint(finished_run, tmp_path / "out")
    record = json.loads((output / "checkpoint-3" / FLAGS_FILE).read_text())
    assert record["versions"]["internvl"] == __version__
    record["versions"]["internvl"] = "0.0.9"
    (output / "checkpoint-3" / FLAGS_FILE).write_text(json.dumps(record))
    (output / "checkpoint-3/manifest.json").unlink()  # its checksums
    changed = "--learning_rate 5e-4 --logging_steps 2 --gradient_accumulation_steps 2".split()
    printed = run_training(tiny_inputs, output, *FLAGS, *changed).stdout
    assert f"Versions: python {platform.python_version()}, internvl {__version__}, torch " in printed
    assert "Resuming with other settings:\n" in printed
    assert "  --learning_rate 0.001 -> 0.0005 (taken from the command line)\n" in printed
    assert "  --gradient_accumulation_steps 4 -> 2 (taken from the command line; the rest of the epoch is" in printed
    assert "--logging_steps (no effect on the result)\n" in printed
    assert f"  internvl 0.0.9 -> {__version__} (results may differ by rounding)\n" in printed
    assert [entry["step"] for entry in read_step_logs(output)] == [1, 2, 3, 4, 6], "--logging_steps 2 acts"


@pytest.mark.multiprocess
def test_checkpoint_without_flags_is_resumed(tiny_inputs, finished_run, tmp_path):
    """An earlier version wrote it. Settings of its adapters are compared nevertheless."""
    output = start_at_checkpoint(finished_run, tmp_path / "out")
    (output / "checkpoint-3" / FLAGS_FILE).unlink()
    (output / "checkpoint-3/manifest.json").unlink()
    refused = run_training(tiny_inputs, output, *FLAGS, "--llm_lora_alpha", "3", status=1)
    assert "--llm_lora_alpha 8 -> 3.0: not supported when resuming" in refused.stderr
    assert f"has no {FLAGS_FILE}: it is unknown which flags differ" in run_training(tiny_inputs, output, *FLAGS).stdout
    assert read_losses(output) == read_losses(finished_run)


INVALID_FLAGS_FILES = ["[]", "{", '{"flags": 3}', '{"flags": {}, "world_size": 1.5}']
INVALID_FLAGS_FILES += [
    f'{{"flags": {{}}, "world_size": 1, "versions": {{}}, {rest}}}'
    for rest in (
        '"changes": [], "base_model": {"path": 3}',
        '"changes": [1, null]',
        '"changes": [{"from": 3, "flags": {}}]',
        '"changes": [{"from": "checkpoint-1"}]',
        '"changes": [], "datasets": []',
        '"changes": [], "datasets": {"tiny": 3}',
    )
]


@pytest.mark.parametrize("content", INVALID_FLAGS_FILES)
def test_damaged_flags_file_is_an_error(tmp_path, parse_flags, content):
    (tmp_path / FLAGS_FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{FLAGS_FILE} is (invalid|not JSON)"):
        RunRecord(*parse_flags()).resume_from(tmp_path)


@pytest.mark.multiprocess
def test_another_base_model_is_refused_and_a_moved_one_accepted(tiny_inputs, finished_run, tmp_path):
    output = start_at_checkpoint(finished_run, tmp_path / "out")
    other = copy_base(tiny_inputs, tmp_path / "other", scale=1.01)
    refused = run_training(tiny_inputs, output, *FLAGS, "--model_name_or_path", str(other), status=1)
    assert "checkpoint-3 was trained on another base model: expected" in refused.stderr
    assert str(tiny_inputs / "model") in refused.stderr
    moved = copy_base(tiny_inputs, tmp_path / "moved")
    run_training(tiny_inputs, output, *FLAGS, "--model_name_or_path", str(moved))
    assert all((output / name).read_bytes() == (finished_run / name).read_bytes() for name in ADAPTERS)
    assert json.loads((output / "config.json").read_text())["base_model"]["path"] == str(moved)


def test_a_changed_configuration_of_the_base_model_is_reported(tiny_inputs, tmp_path, monkeypatch, caplog):
    """The fingerprint of the base model covers its weights only."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    base = copy_base(tiny_inputs, tmp_path / "base")
    argv = [*build_run_flags(tiny_inputs, tmp_path / "out"), *FLAGS, "--model_name_or_path", str(base)]
    prepare_trainer([*argv, "--max_steps", "3"]).train()
    checkpoint = tmp_path / "out/checkpoint-3"
    prepare_trainer(argv).resume_position(checkpoint)
    assert "has changed" not in caplog.text
    config = json.loads((base / "config.json").read_text())
    config["llm_config"]["rms_norm_eps"] *= 2
    (base / "config.json").write_text(json.dumps(config))
    prepare_trainer(argv).resume_position(checkpoint)
    (warning,) = [text for text in caplog.messages if "has changed" in text]
    assert re.search(
        r"config.json of the base model has changed since .*: llm_config.rms_norm_eps \S+ -> \S+$", warning
    )


@pytest.mark.multiprocess
def test_full_fine_tuning_resumes_with_its_own_weights(tiny_inputs, tmp_path):
    """The base model has no effect, as the checkpoint holds all weights; the run says so."""
    flags = [*TRAIN_LLM_AND_PROJECTOR, "--save_steps", "3"]
    run_training(tiny_inputs, tmp_path / "run", *flags)
    other = copy_base(tiny_inputs, tmp_path / "other", scale=1.01)
    output = start_at_checkpoint(tmp_path / "run", tmp_path / "out")
    printed = run_training(tiny_inputs, output, *flags, "--model_name_or_path", str(other)).stdout
    assert "was trained on another base model" in printed
    assert "The run resumes with the weights of the checkpoint." in printed
    expected = load_weights(tmp_path / "run")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_weights(output).items())
