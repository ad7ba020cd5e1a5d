"""Every flag of the training loop has an effect or is refused.

Each field of TrainingArguments has an entry in a table; one of the last tests fails for a field without an entry. For
flags that transformers' Trainer implements, the test only checks that its source reads them. `test_flags.py` has the
flags of model and data.
"""

import json
from dataclasses import fields
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.training_runs import build_run_flags, prepare_trainer

from internvl.arguments.evaluation import EvaluationArguments
from internvl.arguments.fault_tolerance import FaultToleranceArguments
from internvl.arguments.optimizers import SUPPORTED_OPTIMIZERS
from internvl.arguments.per_part import PartRateArguments
from internvl.arguments.training import TrainingArguments, parse_args
from internvl.arguments.unsupported_flags import REMOVED_FLAGS, UNSUPPORTED
from internvl.checkpoint.resume import choose_resume_checkpoint
from internvl.train.run_training import train_and_save

# -- flags that this package implements --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(tiny_inputs, tmp_path_factory):
    """Make trainers from flags, before their first step, with 13 samples."""

    def steps(*flags: str, **kwargs):
        output = tmp_path_factory.mktemp("out")
        return prepare_trainer([*build_run_flags(tiny_inputs, output), "--freeze_backbone", "True", *flags])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
        yield steps


def list_planned_samples(trainer) -> list:
    """Return the samples of epoch 0 by step, micro-batch, rank and row.

    -1 marks an empty place.
    """
    plan = trainer.schedule.plan(0)
    return np.append(plan.samples, -1)[plan.steps].tolist()


# flag -> command line, what to read from the trainer, its expected value
TRAINER_FLAGS = {
    "per_device_train_batch_size": (
        ["--per_device_train_batch_size", "2"],
        lambda t: t.schedule.plan(0).steps.shape,
        (2, 4, 1, 2),
    ),
    "gradient_accumulation_steps": (
        ["--gradient_accumulation_steps", "2"],
        lambda t: t.schedule.plan(0).steps.shape,
        (7, 2, 1, 1),
    ),
    "max_steps": (["--max_steps", "5"], lambda t: t.count_steps(), 5),
    "num_train_epochs": (["--max_steps", "-1", "--num_train_epochs", "1.5"], lambda t: t.count_steps(), 6),
    "learning_rate": (
        ["--learning_rate", "0.5"],
        lambda t: {g["lr"] for g in t.create_optimizer().param_groups},
        {0.5},
    ),
    "weight_decay": (
        ["--weight_decay", "0.5"],
        lambda t: {g["weight_decay"] for g in t.create_optimizer().param_groups},
        {0.5},
    ),
    "optim": (["--optim", "sgd"], lambda t: type(t.create_optimizer()), torch.optim.SGD),
    "optim_args": (
        ["--optim", "sgd", "--optim_args", "momentum=0.5"],
        lambda t: t.create_optimizer().defaults["momentum"],
        0.5,
    ),
    "adam_beta1": (["--adam_beta1", "0.5"], lambda t: t.create_optimizer().defaults["betas"], (0.5, 0.999)),
    "adam_beta2": (["--adam_beta2", "0.5"], lambda t: t.create_optimizer().defaults["betas"], (0.9, 0.5)),
    "adam_epsilon": (["--adam_epsilon", "0.5"], lambda t: t.create_optimizer().defaults["eps"], 0.5),
    "warmup_ratio": (["--warmup_ratio", "0.5"], lambda t: t.args.get_warmup_steps(6), 3),
    "warmup_steps": (["--warmup_steps", "4"], lambda t: t.args.get_warmup_steps(6), 4),
    "bf16": (["--bf16", "True"], lambda t: t.model.vision_model.dtype, torch.bfloat16),
    "dataloader_num_workers": (
        ["--dataloader_num_workers", "1"],
        lambda t: t.get_train_dataloader().num_workers,
        1,
    ),
    "dataloader_prefetch_factor": (
        ["--dataloader_num_workers", "1", "--dataloader_prefetch_factor", "5"],
        lambda t: t.get_train_dataloader().prefetch_factor,
        5,
    ),
    "dataloader_multiprocessing_context": (
        ["--dataloader_num_workers", "1", "--dataloader_multiprocessing_context", "spawn"],
        lambda t: t.get_train_dataloader().multiprocessing_context.get_start_method(),
        "spawn",
    ),
    # Workers last for the run with either value: there is one iterator.
    "dataloader_persistent_workers": (
        ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "True"],
        lambda t: t.get_train_dataloader().persistent_workers,
        False,
    ),
    "output_dir": (["--output_dir", "elsewhere"], lambda t: t.args.output_dir, "elsewhere"),
}


@pytest.mark.parametrize("name", [name for name in TRAINER_FLAGS if name in TrainingArguments.__dataclass_fields__])
def test_trainer_flag_has_an_effect(steps, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, read, expected = TRAINER_FLAGS[name]
    assert read(steps(*flags)) == expected


@pytest.mark.parametrize("name", SUPPORTED_OPTIMIZERS)
def test_supported_optimizers_update_weights(steps, name):
    trainer = steps("--optim", name)
    optimizer, weight = trainer.create_optimizer(), trainer.model.mlp1[1].weight
    before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(weight, before)


def test_neftune_noise_alpha_changes_the_loss(steps):
    """Compare one step from the same weights on the same samples."""
    losses = [steps("--max_steps", "1", *flags).train().training_loss for flags in ([], ["--neftune_noise_alpha", "9"])]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", ["seed", "data_seed", "group_by_length"])
def test_flag_changes_the_sample_order(steps, name):
    plans = [list_planned_samples(steps(f"--{name}", value)) for value in ("1", "1", "0")]
    assert plans[0] == plans[1] != plans[2]


def test_do_train_false_trains_nothing(steps):
    trainer = steps("--do_train", "False")
    train_and_save(trainer, None, None)
    assert trainer.state.global_step == 0
    assert not list(Path(trainer.args.output_dir).glob("*.safetensors"))
    assert parse_args(["--output_dir", "x"])[2].do_train, "True is this package's default, False transformers'"


def test_checkpoint_to_resume_from(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-3").mkdir(parents=True)
    (out / "checkpoint-3/trainer_state.json").write_text('{"global_step": 3}')

    def start(*flags: str) -> str | None:
        return choose_resume_checkpoint(parse_args(["--output_dir", str(out), *flags])[2])

    assert start() == start("--overwrite_output_dir", "False") == str(out / "checkpoint-3")
    assert start("--overwrite_output_dir", "True") is None
    assert start("--resume_from_checkpoint", str(out / "checkpoint-3"), "--overwrite_output_dir") is not None
    with pytest.raises(ValueError, match="--resume_from_checkpoint /no/where: no checkpoint"):
        start("--resume_from_checkpoint", "/no/where")


def test_local_rank_of_old_launchers_is_ignored(parse_flags):
    assert parse_flags("--local_rank", "3")[2].process_index == 0


def test_either_gradient_checkpointing_flag_enables_it(steps):
    """InternVL 3.5's recipes pass both."""
    trainer = steps("--grad_checkpoint", "False", "--gradient_checkpointing", "True", "--max_steps", "1")
    assert not trainer.model.is_gradient_checkpointing
    trainer.train()
    assert trainer.model.is_gradient_checkpointing


# test file -> flags
TESTED_ELSEWHERE = {
    "this one": "overwrite_output_dir resume_from_checkpoint do_train evaluation_strategy seed data_seed "
    "group_by_length gradient_checkpointing activation_checkpointing local_rank neftune_noise_alpha".split(),
    "test_adapter_lifecycle.py": ["save_full_model", "no_smoke_save"],
    "test_part_settings.py": ["lora_fp32", "backbone_layer_decay", *(f.name for f in fields(PartRateArguments))],
    "test_equality.py": ["deepspeed"],
    "test_signals.py, test_faults.py, test_watchdog.py": [f.name for f in fields(FaultToleranceArguments)],
    "test_killed_ranks.py": ["ddp_timeout"],
    "test_evaluation_flags.py, test_evaluation_strategy.py, test_best_checkpoint.py": "eval_strategy eval_steps "
    "eval_delay eval_on_start do_eval load_best_model_at_end metric_for_best_model greater_is_better save_strategy "
    "per_device_eval_batch_size".split(),
    "evaluation/": [f.name for f in fields(EvaluationArguments)],
}

# -- flags that transformers implements --------------------------------------------------------------------------------

TRANSFORMERS_DIR = Path(transformers.__file__).parent
TRANSFORMERS_SOURCES = [
    *(TRANSFORMERS_DIR / name for name in ("trainer.py", "training_args.py", "trainer_callback.py")),
    *(TRANSFORMERS_DIR / "integrations").glob("*.py"),
]


def is_read_by_transformers(name: str) -> bool:
    """Check whether transformers' sources read this field of its arguments."""
    text = "".join(file.read_text() for file in TRANSFORMERS_SOURCES)
    return any(spelling in text for spelling in (f"args.{name}", f"self.{name}", f'("{name}", "'))


READ_BY_TRANSFORMERS = """
    lr_scheduler_type lr_scheduler_kwargs max_grad_norm fp16 tf32 activation_checkpointing_kwargs
    gradient_checkpointing_kwargs torch_empty_cache_steps logging_strategy logging_steps
    logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to
    run_name project logging_dir trackio_space_id trackio_bucket_id trackio_static_space_id save_only_model save_steps
    save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision restore_callback_states_from_checkpoint full_determinism use_cpu
    dataloader_pin_memory remove_unused_columns ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph debug skip_memory_metrics label_names
""".split()


# -- flags that are not supported --------------------------------------------------------------------------------------

# flag -> a value that is refused; "True" for the others
INVALID_VALUES = {
    "accelerator_config": '{"split_batches": true}',
    "average_tokens_across_devices": "False",
    "dataloader_in_order": "False",
    "ddp_backend": "gloo",
    "eval_accumulation_steps": "2",
    "eval_do_concat_batches": "False",
    "include_for_metrics": "loss",
    "fsdp": "full_shard",
    "label_smoothing_factor": "0.1",
    "train_sampling_strategy": "group_by_length",
}
DICT_FLAGS = ["parallelism_config", "liger_kernel_config"]  # in a JSON file of arguments


FIELDS = {field.name for field in fields(TrainingArguments)}


@pytest.mark.parametrize("name", sorted((UNSUPPORTED.keys() & FIELDS) - set(DICT_FLAGS)))
def test_unsupported_flag_is_refused_with_a_reason(parse_flags, name):
    with pytest.raises(ValueError, match=f"^--{name} .* is not supported: .*\\.$"):
        parse_flags(f"--{name}", INVALID_VALUES.get(name, "True"))


def test_unsupported_dict_flag_is_refused(tmp_path):
    for name in DICT_FLAGS:
        (tmp_path / "args.json").write_text(json.dumps({"output_dir": str(tmp_path), name: {"a": 1}}))
        with pytest.raises(ValueError, match=f"--{name} .* is not supported"):
            parse_args([str(tmp_path / "args.json")])


INVALID = {
    "optim": (["--optim", "lomo"], "--optim lomo is not supported"),
    "optim with DeepSpeed": (
        ["--optim", "adafactor", "--deepspeed", "zero_stage1_config.json"],
        "--optim adafactor is not supported with --deepspeed: it factors",
    ),
    "optim_args of AdamW": (["--optim_args", "a=1"], "--optim_args a=1 is not supported with AdamW"),
    "no accumulation": (
        ["--gradient_accumulation_steps", "0"],
        "--gradient_accumulation_steps 0 is invalid: expected an integer from 1 to 65,536",
    ),
    "no batch": (
        ["--per_device_train_batch_size", "0"],
        "--per_device_train_batch_size 0 is invalid: expected an integer from 1 to 65,536",
    ),
    "no steps": (["--max_steps", "0"], "--max_steps 0 with --num_train_epochs 3.0 is invalid: there are no"),
    "no epochs": (
        ["--max_steps", "-1", "--num_train_epochs", "0"],
        "with --num_train_epochs 0.0 is invalid: there are no",
    ),
    "second SIGTERM handler": (
        ["--enable_jit_checkpoint", "True"],
        "not supported: it installs a second SIGTERM handler",
    ),
    "removed flag": (
        ["--save_safetensors", "True"],
        "--save_safetensors True; weights are always saved as safetensors",
    ),
}


@pytest.mark.parametrize(("flags", "message"), INVALID.values(), ids=INVALID)
def test_invalid_values_are_refused(parse_flags, flags, message):
    with pytest.raises(ValueError, match=message):
        parse_flags(*flags)


def test_default_values_are_accepted(parse_flags):
    _, _, args = parse_flags("--save_strategy", "no", "--eval_strategy", "no", "--optim", "adamw_torch")
    assert (args.save_strategy, args.eval_strategy, args.optim) == ("no", "no", "adamw_torch")


def test_removed_flags_are_not_fields():
    assert REMOVED_FLAGS.keys() & FIELDS <= {"logging_dir"}  # before transformers 5.17


# -- completeness ------------------------------------------------------------------------------------------------------


def test_every_field_has_a_check():
    """The tables may have more flags: some are of later transformers versions."""
    assert {
        *TRAINER_FLAGS,
        *chain(*TESTED_ELSEWHERE.values()),
        *READ_BY_TRANSFORMERS,
        *UNSUPPORTED,
    } >= FIELDS


@pytest.mark.parametrize("name", sorted(FIELDS & set(READ_BY_TRANSFORMERS)))
def test_transformers_reads_the_flag(name):
    assert is_read_by_transformers(name)
