"""Optimizers, schedulers and reporters: each of transformers' is supported, or refused with a reason."""

import importlib.util
import json
import sys

import pytest
from helpers.paths import REPO_ROOT
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from internvl.arguments.optimizers import BITSANDBYTES, SUPPORTED_OPTIMIZERS, UNSUPPORTED_OPTIMIZERS
from internvl.arguments.reporters import REQUIREMENTS
from internvl.arguments.schedulers import NEED_METRIC, TAKE_NO_ARGUMENTS
from internvl.arguments.training import TrainingArguments, parse_args


def parse(tmp_path, *flags: str):
    return parse_args(["--output_dir", str(tmp_path), "--max_steps", "10", *flags])[2]


def refuse(tmp_path, *flags: str) -> str:
    """Check that flags are refused in one line; return it."""
    with pytest.raises(ValueError) as error:
        parse(tmp_path, *flags)
    assert "\n" not in str(error.value) and str(error.value).endswith((".", "?"))
    return str(error.value)


# -- optimizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_optimizer_is_supported_or_refused_with_its_reason(name, tmp_path):
    if name in SUPPORTED_OPTIMIZERS:
        assert parse(tmp_path, "--optim", name).optim.value == name
    else:
        (reason,) = (reason for names, reason in UNSUPPORTED_OPTIMIZERS.items() if name in names)
        assert refuse(tmp_path, "--optim", name) == f"--optim {name} is not supported: {reason}."


def test_page_lists_optimizers_and_schedulers():
    page = (REPO_ROOT / "docs/configuration.md").read_text()
    section = page.split("## Optimizer and learning rate")[1].split("\n## ")[0]
    names = [*SUPPORTED_OPTIMIZERS, *(name.value for name in SchedulerType)]
    assert [name for name in names if f"`{name}`" not in section] == []


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_missing_bitsandbytes(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    expected = f"--optim {name} requires the package bitsandbytes: python3 -m pip install bitsandbytes."
    assert refuse(tmp_path, "--optim", name) == expected


DEEPSPEED = ["--deepspeed", "zero_stage2_config.json"]
INVALID_OPTIMIZERS = {
    "adafactor --deepspeed": "--optim adafactor is not supported with --deepspeed: it factors the statistics",
    "adagrad --deepspeed": "--optim adagrad is not supported with --deepspeed: DeepSpeed creates it anew",
    "sgd --optim_args momentum": "--optim_args momentum is invalid with --optim sgd: expected KEY=NUMBER",
    "sgd --optim_args lr=1": "--optim_args lr=1 is invalid with --optim sgd: expected KEY=NUMBER",
    "sgd --optim_args momentum=nan": "--optim_args momentum=nan is invalid with --optim sgd",
    "sgd --optim_args momentum=-1": "--optim sgd with --optim_args momentum=-1 is invalid: Invalid momentum value: -1",
    "sgd --optim_args nesterov=true": "--optim sgd with --optim_args nesterov=true is invalid: Nesterov momentum",
    "ademamix --optim_args t_alpha=1.5": "--optim ademamix with --optim_args t_alpha=1.5 is invalid: invalid literal",
    "lion_8bit --optim_args a=1": "--optim_args a=1 is not supported with --optim lion_8bit: remove it.",
    "adamw_torch_fused --optim_args a=1": "--optim_args a=1 is not supported with AdamW: use --adam_beta1",
}


@pytest.mark.parametrize(("flags", "message"), INVALID_OPTIMIZERS.items(), ids=INVALID_OPTIMIZERS)
def test_invalid_optimizer_arguments(flags, message, tmp_path):
    words = [word for flag in flags.split() for word in (DEEPSPEED if flag == "--deepspeed" else [flag])]
    assert refuse(tmp_path, "--optim", *words).startswith(message)


def test_offloaded_states_of_other_optimizers_keep_their_optimizer(tmp_path):
    """accelerate puts DeepSpeed's CPU Adam in place of any optimizer that it does not know."""
    offload = ["--deepspeed", "zero_stage3_config_100b_1e7_offload.json"]
    assert parse(tmp_path, "--optim", "sgd", *offload).deepspeed["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in parse(tmp_path, *offload).deepspeed


# -- schedulers --------------------------------------------------------------------------------------------------------

REQUIRED_ARGUMENTS = {
    "cosine_with_min_lr": {"min_lr": 1e-6},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}


@pytest.mark.parametrize("name", [name.value for name in SchedulerType])
def test_scheduler_is_supported(name, tmp_path):
    flags = ["--lr_scheduler_type", name]
    if name in NEED_METRIC:
        assert refuse(tmp_path, *flags) == f"--lr_scheduler_type {name} requires --eval_strategy steps or epoch."
        flags += ["--eval_strategy", "epoch"]
    if arguments := REQUIRED_ARGUMENTS.get(name):
        assert next(iter(arguments)).split("_rate")[0] in refuse(tmp_path, *flags)
        flags += ["--lr_scheduler_kwargs", json.dumps(arguments)]
    assert parse(tmp_path, *flags).lr_scheduler_type == name


INVALID_TIMESCALE = (
    "--lr_scheduler_kwargs 'timescale' is not supported with --lr_scheduler_type inverse_sqrt: it takes no arguments."
    if SchedulerType.INVERSE_SQRT in TAKE_NO_ARGUMENTS  # transformers < 5.4
    else "--lr_scheduler_type inverse_sqrt with --lr_scheduler_kwargs"
)
# --lr_scheduler_type, --lr_scheduler_kwargs, message
INVALID_SCHEDULERS = [
    ("cosine", "[1]", "--lr_scheduler_kwargs [1] is invalid: expected a JSON object"),
    ("cosine", "abc", "--lr_scheduler_kwargs abc is invalid: expected a JSON object"),
    ("cosine", "{", "--lr_scheduler_kwargs { is invalid: expected a JSON object"),
    ("cosine", '{"a": 1}', "--lr_scheduler_kwargs 'a' is not supported with --lr_scheduler_type cosine: expected"),
    ("linear", '{"a": 1}', "--lr_scheduler_kwargs 'a' is not supported with --lr_scheduler_type linear: it takes no"),
    ("constant", '{"a": 1}', "--lr_scheduler_kwargs 'a' is not supported with --lr_scheduler_type constant: it takes"),
    ("cosine", '{"num_warmup_steps": 1}', "--lr_scheduler_kwargs 'num_warmup_steps' is not supported with"),
    ("cosine", '{"num_cycles": "x"}', "--lr_scheduler_type cosine with --lr_scheduler_kwargs {'num_cycles': 'x'} is"),
    ("cosine_with_min_lr", '{"min_lr": NaN}', "--lr_scheduler_kwargs 'min_lr' nan is invalid: expected a number >= 0"),
    ("cosine_with_min_lr", '{"min_lr": -1}', "--lr_scheduler_kwargs 'min_lr' -1 is invalid: expected a number >= 0"),
    ("cosine_with_min_lr", '{"min_lr": 1}', "--lr_scheduler_type cosine_with_min_lr with --lr_scheduler_kwargs"),
    ("cosine_with_min_lr", '{"min_lr": 0, "min_lr_rate": 0}', "--lr_scheduler_type cosine_with_min_lr with"),
    (
        "polynomial",
        '{"lr_end": 3}',
        "--lr_scheduler_type polynomial with --lr_scheduler_kwargs {'lr_end': 3} is invalid",
    ),
    ("inverse_sqrt", '{"timescale": 0}', INVALID_TIMESCALE),
    (
        "warmup_stable_decay",
        '{"num_decay_steps": 3, "decay_type": "x"}',
        "--lr_scheduler_type warmup_stable_decay with",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "message"), INVALID_SCHEDULERS)
def test_invalid_scheduler_arguments(name, arguments, message, tmp_path):
    flags = ["--lr_scheduler_type", name, "--lr_scheduler_kwargs", arguments]
    assert refuse(tmp_path, *flags).startswith(message)


@pytest.mark.parametrize("flag", ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_other_json_flags(flag, tmp_path):
    if flag not in TrainingArguments.__dataclass_fields__:  # before transformers 5.23
        assert refuse(tmp_path, f"--{flag}", "{").startswith(f"unknown flag: --{flag}")
        return
    assert refuse(tmp_path, f"--{flag}", "{").startswith(f"--{flag} {{ is invalid: expected a JSON object")


# -- reporters ---------------------------------------------------------------------------------------------------------


def test_every_reporter_of_transformers_is_known():
    assert REQUIREMENTS.keys() >= INTEGRATION_TO_CALLBACK.keys()


@pytest.mark.parametrize("name", sorted(INTEGRATION_TO_CALLBACK.keys() - {"tensorboard"}))
def test_missing_package_of_a_reporter(name, tmp_path):
    if importlib.util.find_spec({"comet_ml": "comet_ml", "flyte": "flytekit", "azure_ml": "azureml"}.get(name, name)):
        pytest.skip(f"{name} is installed")
    for value in (name, f"tensorboard,{name}"):
        assert refuse(tmp_path, "--report_to", value) == (
            f"--report_to {name} is not available: it requires {REQUIREMENTS[name]}."
        )


def test_values_of_report_to(tmp_path):
    assert parse(tmp_path, "--report_to", "none").report_to == []
    assert parse(tmp_path, "--report_to", "tensorboard").report_to == ["tensorboard"]
    assert "tensorboard" in parse(tmp_path, "--report_to", "all").report_to
    assert refuse(tmp_path, "--report_to", "tensorbord").startswith("--report_to tensorbord is invalid: expected all,")
    assert refuse(tmp_path, "--report_to", "none,tensorboard").startswith("--report_to none is invalid")
    assert refuse(tmp_path, "--report_to", "tensorboard,").startswith("--report_to '' is invalid")
    assert refuse(tmp_path, "--report_to", "tensorboard, x").startswith("--report_to x is invalid")
