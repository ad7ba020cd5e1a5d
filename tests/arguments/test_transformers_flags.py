"""Every flag of a run acts or is refused: one entry a field of TrainingArguments; a field without an entry fails.

What transformers' Trainer reads by itself is only looked up there. `test_flags.py` has the flags of model and data.
"""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.training_runs import flags_of, prepare

from internvl.arguments.fault_tolerance import FaultToleranceArguments
from internvl.arguments.per_part import RateArguments
from internvl.arguments.training import TrainingArguments, parse_args
from internvl.arguments.unsupported_flags import REMOVED_FLAGS, SUPPORTED_VALUES, UNSUPPORTED
from internvl.checkpoint.resume import choose_resume_checkpoint
from internvl.train.run_training import train_and_save

# -- how a run goes: what this package does with transformers' flags ---------------------------------------------------


@pytest.fixture(scope="module")
def steps(tiny, tmp_path_factory):
    """Flags -> the trainer as it is before the first step, over 13 samples."""

    def steps(*flags: str, **kwargs):
        output = tmp_path_factory.mktemp("out")
        return prepare([*flags_of(tiny, output), "--freeze_backbone", "True", *flags])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
        yield steps


def planned_steps(trainer) -> int:
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def plan_of(trainer) -> list:
    plan = trainer.schedule.plan(0)
    return np.append(plan.samples, -1)[plan.steps].tolist()


# flag -> flags, what to look at, what it is then
RUN = {
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
    "max_steps": (["--max_steps", "5"], planned_steps, 5),
    "num_train_epochs": (["--max_steps", "-1", "--num_train_epochs", "1.5"], planned_steps, 6),
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
    "dataloader_persistent_workers": (
        ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "True"],
        lambda t: t.get_train_dataloader().persistent_workers,
        True,
    ),
    "output_dir": (["--output_dir", "elsewhere"], lambda t: t.args.output_dir, "elsewhere"),
}


@pytest.mark.parametrize("name", RUN)
def test_run_flags(steps, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, look, expected = RUN[name]
    assert look(steps(*flags)) == expected


@pytest.mark.parametrize("name", SUPPORTED_VALUES["optim"][0])
def test_every_optimizer_that_is_not_refused_steps(steps, name):
    trainer = steps("--optim", name)
    optimizer, weight = trainer.create_optimizer(), trainer.model.mlp1[1].weight
    before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(weight, before)


def test_neftune_noise_alpha(steps):
    """One step from the same weights on the same samples; the noise is on the embeddings."""
    losses = [steps("--max_steps", "1", *flags).train().training_loss for flags in ([], ["--neftune_noise_alpha", "9"])]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", ["seed", "data_seed", "group_by_length"])
def test_flags_that_change_the_order(steps, name):
    plans = [plan_of(steps(f"--{name}", value)) for value in ("1", "1", "0")]
    assert plans[0] == plans[1] != plans[2]


def test_do_train_false_sets_up_and_stops(steps):
    trainer = steps("--do_train", "False")
    train_and_save(trainer, None, None)
    assert trainer.state.global_step == 0
    assert not list(Path(trainer.args.output_dir).glob("*.safetensors"))
    assert parse_args(["--output_dir", "x"])[2].do_train, "the default of this package"


def test_where_a_run_begins(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-3").mkdir(parents=True)
    (out / "checkpoint-3/trainer_state.json").write_text("{}")

    def start(*flags: str) -> str | None:
        return choose_resume_checkpoint(parse_args(["--output_dir", str(out), *flags])[2])

    assert start() == start("--overwrite_output_dir", "False") == str(out / "checkpoint-3")
    assert start("--overwrite_output_dir", "True") is None
    assert start("--resume_from_checkpoint", str(out / "checkpoint-3"), "--overwrite_output_dir") is not None
    with pytest.raises(ValueError, match="--resume_from_checkpoint /no/where: no checkpoint"):
        start("--resume_from_checkpoint", "/no/where")


def test_the_launcher_knows_the_rank_better_than_an_old_launchers_flag(parse):
    assert parse("--local_rank", "3")[2].process_index == 0


def test_checkpointing_by_transformers_flag(steps):
    """InternVL 3.5's recipes give both flags; either switches it on."""
    trainer = steps("--grad_checkpoint", "False", "--gradient_checkpointing", "True", "--max_steps", "1")
    assert not trainer.model.is_gradient_checkpointing
    trainer.train()
    assert trainer.model.is_gradient_checkpointing


HERE = ["overwrite_output_dir", "resume_from_checkpoint", "do_train", "evaluation_strategy", "seed", "data_seed"]
HERE += ["group_by_length", "gradient_checkpointing", "activation_checkpointing", "local_rank"]
HERE += ["neftune_noise_alpha"]
HERE += ["save_full_model", "no_smoke_save"]  # test_life.py
HERE += ["lora_fp32", "backbone_layer_decay", *(field.name for field in fields(RateArguments))]  # test_part_settings.py
HERE += ["deepspeed"]  # test_equality.py
HERE += [
    field.name for field in fields(FaultToleranceArguments)
]  # test_preemption.py, test_faults.py, test_watchdog.py
HERE += ["ddp_timeout"]  # test_no_hang.py

# -- transformers' own -------------------------------------------------------------------------------------------------

# flag -> the flag that is refused and without which it does nothing, by transformers' documentation
IDLE = {
    **dict.fromkeys(
        ["eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only"], "eval_strategy"
    ),
    **dict.fromkeys(["eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"], "eval_strategy"),
    **dict.fromkeys(["include_for_metrics", "batch_eval_metrics", "bf16_full_eval"], "eval_strategy"),
    **dict.fromkeys(["fp16_full_eval", "label_names"], "eval_strategy"),
    **dict.fromkeys(["metric_for_best_model", "greater_is_better"], "load_best_model_at_end"),
}
SOURCES = [Path(transformers.__file__).parent / name for name in ("trainer.py", "training_args.py", "integrations")]


def reads(name: str) -> bool:
    """Does transformers itself read this field of its arguments?"""
    files = [file for source in SOURCES for file in ([source] if source.is_file() else source.glob("*.py"))]
    text = "".join(file.read_text() for file in [*files, SOURCES[0].with_name("trainer_callback.py")])
    return any(spelling in text for spelling in (f"args.{name}", f"self.{name}", f'("{name}", "'))


TRANSFORMERS = """
    lr_scheduler_type lr_scheduler_kwargs max_grad_norm fp16 tf32 activation_checkpointing_kwargs
    gradient_checkpointing_kwargs torch_empty_cache_steps logging_strategy logging_steps
    logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to
    run_name project trackio_space_id trackio_bucket_id trackio_static_space_id save_only_model save_steps
    save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision restore_callback_states_from_checkpoint full_determinism use_cpu
    dataloader_pin_memory remove_unused_columns ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph debug skip_memory_metrics
""".split()


def test_idle_flags_belong_to_a_refused_one():
    assert set(IDLE.values()) <= UNSUPPORTED.keys()


# -- refused -----------------------------------------------------------------------------------------------------------

WITH = {
    "accelerator_config": '{"split_batches": true}',
    "average_tokens_across_devices": "False",
    "dataloader_in_order": "False",
    "ddp_backend": "gloo",
    "eval_strategy": "steps",
    "fsdp": "full_shard",
    "label_smoothing_factor": "0.1",
    "train_sampling_strategy": "group_by_length",
}
DICTIONARIES = ["parallelism_config", "liger_kernel_config"]  # in a JSON file of arguments


@pytest.mark.parametrize("name", sorted(UNSUPPORTED.keys() - set(DICTIONARIES)))
def test_refused_flags(parse, name):
    with pytest.raises(ValueError, match=f"^--{name} .* cannot act here: .*\\.$"):
        parse(f"--{name}", WITH.get(name, "True"))


def test_a_mapping_without_a_command_line_is_refused_too(tmp_path):
    for name in DICTIONARIES:
        (tmp_path / "args.json").write_text(json.dumps({"output_dir": str(tmp_path), name: {"a": 1}}))
        with pytest.raises(ValueError, match=f"--{name} .* cannot act here"):
            parse_args([str(tmp_path / "args.json")])


REFUSED_TOGETHER = {
    "evaluation_strategy": (["--evaluation_strategy", "epoch"], "--eval_strategy epoch cannot act here: there is no"),
    "save_strategy": (["--save_strategy", "best"], "--save_strategy best cannot act here: there is no evaluation data"),
    "optim": (["--optim", "lomo"], "--optim lomo cannot act here"),
    "optim with DeepSpeed": (
        ["--optim", "sgd", "--deepspeed", "zero_stage1_config.json"],
        "--optim sgd cannot act together with --deepspeed",
    ),
    "optim_args of AdamW": (["--optim_args", "a=1"], "--optim_args a=1 cannot act"),
    "no accumulation": (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0 must be at least 1"),
    "no batch": (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0 must be at least 1"),
    "no steps": (["--max_steps", "0"], "--max_steps 0 --num_train_epochs 3.0 leave nothing to train"),
    "no epochs": (["--max_steps", "-1", "--num_train_epochs", "0"], "--num_train_epochs 0.0 leave nothing to train"),
    "dropped": (["--save_safetensors", "True"], "--save_safetensors True; weights are always saved as safetensors"),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED_TOGETHER.values(), ids=REFUSED_TOGETHER)
def test_values_that_cannot_act(parse, flags, message):
    with pytest.raises(ValueError, match=message):
        parse(*flags)


def test_nothing_is_refused_that_is_a_default(parse):
    _, _, args = parse("--save_strategy", "no", "--eval_strategy", "no", "--optim", "adamw_torch")
    assert (args.save_strategy, args.eval_strategy, args.optim) == ("no", "no", "adamw_torch")


def test_dropped_flags_are_not_fields():
    assert not REMOVED_FLAGS.keys() & {field.name for field in fields(TrainingArguments)}


# -- all of them -------------------------------------------------------------------------------------------------------


FIELDS = {field.name for field in fields(TrainingArguments)}


def test_every_field_has_a_check():
    """Some have come with later versions of transformers than the one that runs."""
    assert {*RUN, *HERE, *IDLE, *TRANSFORMERS, *UNSUPPORTED, *SUPPORTED_VALUES} >= FIELDS


@pytest.mark.parametrize("name", sorted(FIELDS & {*TRANSFORMERS, *IDLE}))
def test_transformers_reads_it(name):
    assert reads(name)
