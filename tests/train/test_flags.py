"""Every flag acts or is refused: one entry a field of the three argument classes; a field without an entry fails.

An entry is a check with the flags it takes. What transformers' Trainer reads by itself is only looked up there.
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from runs import composed, flags_of, prepare
from samples import turns

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.lora import is_wrapped
from internvl.train.arguments import FINETUNE, parse_args
from internvl.train.build import allowed_bad_samples, build_model, build_tokenizer
from internvl.train.check import check, resume_point
from internvl.train.internvl_chat_finetune import train_and_save
from internvl.train.refused import DROPPED, ONLY, REFUSED

ModelArguments, DataTrainingArguments, TrainingArguments = FINETUNE
PATHS = {"model_name_or_path": "model", "vision_path": "vit", "llm_path": "llm", "mlp_path": "mlp_projector.pth"}


@pytest.fixture
def parse(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))

    def parse(*flags: str):
        return parse_args([*flags_of(tiny, tmp_path / "out"), *flags])

    return parse


@pytest.fixture
def build(parse):
    def build(*flags: str) -> InternVLChatModel:
        model_args, data_args, training_args = parse(*flags)
        check(model_args, data_args)
        return build_model(model_args, data_args, training_args, build_tokenizer(model_args, data_args))

    return build


def trained(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapter_rank(module: torch.nn.Module) -> int:
    return module.peft_config["default"].r if is_wrapped(module) else 0


# -- which weights, and which of them train ----------------------------------------------------------------------------

MODEL = {
    "freeze_llm": (["--freeze_llm"], lambda m: not trained(m.language_model) and trained(m.mlp1)),
    "freeze_backbone": (["--freeze_backbone"], lambda m: not trained(m.vision_model) and trained(m.mlp1)),
    "freeze_mlp": (["--freeze_mlp"], lambda m: not trained(m.mlp1) and trained(m.vision_model)),
    "unfreeze_vit_layers": (
        ["--freeze_backbone", "--unfreeze_vit_layers", "1"],
        lambda m: {n.split("layers.")[-1][0] for n in trained(m.vision_model)} == {"1"},
    ),
    "vision_select_layer": (
        ["--vision_select_layer", "-2"],
        lambda m: m.select_layer == -2 and "encoder.layers.1.ls1" not in trained(m.vision_model),
    ),
    "use_backbone_lora": (["--use_backbone_lora", "2"], lambda m: adapter_rank(m.vision_model) == 2),
    "use_llm_lora": (["--use_llm_lora", "2"], lambda m: adapter_rank(m.language_model) == 2),
    "unfreeze_lm_head": (
        ["--freeze_llm", "--unfreeze_lm_head"],
        lambda m: trained(m.language_model) == {"lm_head.weight"},
    ),
    "grad_checkpoint": (["--grad_checkpoint", "False"], lambda m: not m.is_gradient_checkpointing),
    "drop_path_rate": (
        ["--drop_path_rate", "0.3"],
        lambda m: getattr(m.vision_model.encoder.layers[-1].drop_path2, "drop_prob", 0) == 0.3,
    ),
    "ps_version": (["--ps_version", "v1"], lambda m: m.ps_version == m.config.ps_version == "v1"),
}


@pytest.mark.parametrize("name", MODEL)
def test_model_flags(build, name):
    flags, acts = MODEL[name]
    assert not acts(build()), "it is so without the flag, too"
    assert acts(build(*flags))


@pytest.mark.parametrize("name", PATHS)
def test_the_weights_are_those_of_the_path(build, tiny, parts, name):
    part = {"vision_path": "vision_model", "llm_path": "language_model.model.layers", "mlp_path": "mlp1"}.get(name, "")
    flags = [*composed(parts), "--mlp_path", f"{parts}/mlp_projector.pth"] if part else []
    built = build(*flags).get_submodule(part).state_dict()
    source = InternVLChatModel.from_pretrained(tiny / "model").get_submodule(part).state_dict()
    assert all(torch.equal(tensor, built[key]) for key, tensor in source.items())
    with pytest.raises((ValueError, OSError), match="/nowhere/else/at_all"):
        build(*flags, f"--{name}", "/nowhere/else/at_all")


# -- how records become samples ----------------------------------------------------------------------------------------

PICTURE = {"image": "a.png", "conversations": turns("<image>\nWhat is it?", "A house.")}
FILM = {"video": "film", "conversations": turns("<video>\nWhat is it?", "A house.")}

# flag -> record, settings, what to look at, what it is without and with the setting (None: only that it differs)
SAMPLE = {
    "force_image_size": (PICTURE, {"force_image_size": 56}, lambda s: s["pixel_values"].shape[-1], (28, 56)),
    "conv_style": (PICTURE, {"conv_style": "Hermes-2"}, lambda s: s["input_ids"].tolist(), None),
    "dynamic_image_size": (PICTURE, {"dynamic_image_size": False}, lambda s: len(s["pixel_values"]), (7, 1)),
    "use_thumbnail": (PICTURE, {"use_thumbnail": False}, lambda s: len(s["pixel_values"]), (7, 6)),
    "min_dynamic_patch": (PICTURE, {"min_dynamic_patch": 12}, lambda s: len(s["pixel_values"]), (7, 13)),
    "max_dynamic_patch": (PICTURE, {"max_dynamic_patch": 2}, lambda s: len(s["pixel_values"]), (7, 3)),
    "min_num_frame": (FILM, {"min_num_frame": 20}, lambda s: len(s["pixel_values"]), None),
    "max_num_frame": (FILM, {"min_num_frame": 3, "max_num_frame": 3}, lambda s: len(s["pixel_values"]), None),
    "normalize_type": (PICTURE, {"normalize_type": "siglip"}, lambda s: s["pixel_values"].sum().item(), None),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_sample_flags(make, name):
    record, settings, look, expected = SAMPLE[name]
    meta = {"data_augment": False}
    found = [look(make(record, meta=meta, max_length=2000, **s).get(0, epoch=0)) for s in ({}, settings)]
    assert found[0] != found[1]
    assert expected is None or tuple(found) == expected


def test_pad2square(make):
    """Tiles are squares already; an image that is not cut into tiles is padded rather than stretched."""
    settings = {"meta": {"data_augment": False}, "dynamic_image_size": False}
    stretched, padded = (make(PICTURE, pad2square=pad, **settings).get(0, 0)["pixel_values"] for pad in (False, True))
    assert padded.shape == stretched.shape
    assert padded[0, :, 0].std(-1).max() < 1e-5 < stretched[0, :, 0].std(-1).min(), "the first line is padding"


def test_down_sample_ratio(build, parts):
    model = build(*composed(parts), "--down_sample_ratio", "0.25")
    assert (model.num_image_token, model.mlp1[0].normalized_shape[0]) == (
        1,
        16 * model.config.vision_config.hidden_size,
    )
    with pytest.raises(ValueError, match="--down_sample_ratio 0.25 differs from the checkpoint's 0.5"):
        build("--down_sample_ratio", "0.25")
    with pytest.raises(ValueError, match="--down_sample_ratio 0.3: 1 over it"):
        build("--down_sample_ratio", "0.3")


def test_max_seq_length(parse):
    assert build_tokenizer(*parse("--max_seq_length", "77")[:2]).model_max_length == 77


def test_max_bad_samples(parse):
    assert allowed_bad_samples(parse("--max_bad_samples", "0.1")[1], 50) == 5
    assert allowed_bad_samples(parse("--max_bad_samples", "7")[1], 50) == 7


def test_meta_path(build):
    with pytest.raises(ValueError, match="--meta_path is missing"):
        build("--meta_path", "")


def test_use_data_resampling(tiny, tmp_path, monkeypatch):
    """Of 13 and 1 samples, the second set's share is 1 / (1 + sqrt 13): 3 of 14 draws instead of 1."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    meta = json.loads((tiny / "meta.json").read_text())["tiny"]
    lines = Path(meta["annotation"]).read_text().splitlines()
    (tmp_path / "one.jsonl").write_text(lines[0])
    sets = {"many": meta, "one": meta | {"annotation": str(tmp_path / "one.jsonl")}}
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    flags = [*flags_of(tiny, tmp_path / "out"), "--meta_path", str(tmp_path / "meta.json")]

    def draws(*more: str) -> list[int]:
        plan = prepare([*flags, *more]).plan(0)
        return [int(((plan >= 0) & (plan < len(lines))).sum()), int((plan == len(lines)).sum())]

    assert draws() == [13, 1]
    assert draws("--use_data_resampling", "True") == [11, 3]
    assert draws("--use_data_resampling", "True", "--group_by_length", "True") == [11, 3]


PACKING = [f.name for f in fields(DataTrainingArguments) if f.metadata["help"].startswith("packing: ")]
PACKING += ["num_images_expected", "max_packed_tokens"]


def test_packing_is_refused_and_with_it_all_that_belongs_to_it(build):
    with pytest.raises(ValueError, match="--use_packed_ds True: not supported yet"):
        build("--use_packed_ds", "True")


# -- accepted, because there is nothing to choose here; --help says so -------------------------------------------------

ACCEPTED = ["use_fast_tokenizer", "use_custom_flash_attn", "split_annotations"]


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_only_accepted_says_so(name, parse):
    (help,) = (f.metadata["help"] for kind in FINETUNE for f in fields(kind) if f.name == name)
    assert help.startswith("accepted for ")
    model_args, data_args, _ = parse(f"--{name}", "True")
    assert build_tokenizer(model_args, data_args).is_fast


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
    return trainer.plan(0).tolist()


# flag -> flags, what to look at, what it is then
RUN = {
    "per_device_train_batch_size": (["--per_device_train_batch_size", "2"], lambda t: t.plan(0).shape, (2, 4, 1, 2)),
    "gradient_accumulation_steps": (["--gradient_accumulation_steps", "2"], lambda t: t.plan(0).shape, (7, 2, 1, 1)),
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


@pytest.mark.parametrize("name", ONLY["optim"][0])
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
        return resume_point(parse_args(["--output_dir", str(out), *flags])[2])

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
HERE += ["deepspeed"]  # test_training.py

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
    assert set(IDLE.values()) <= REFUSED.keys()


# -- refused -----------------------------------------------------------------------------------------------------------

WITH = {
    "accelerator_config": '{"split_batches": true}',
    "average_tokens_across_devices": "False",
    "dataloader_in_order": "False",
    "ddp_backend": "gloo",
    "ddp_timeout": "7",
    "eval_strategy": "steps",
    "fsdp": "full_shard",
    "label_smoothing_factor": "0.1",
    "train_sampling_strategy": "group_by_length",
}
DICTIONARIES = ["parallelism_config", "liger_kernel_config"]  # in a JSON file of arguments


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - set(DICTIONARIES)))
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
    assert not DROPPED.keys() & {field.name for field in fields(TrainingArguments)}


OUT_OF_RANGE = {
    "no such hidden state": (
        ["--vision_select_layer", "-4"],
        "--vision_select_layer -4: the vision encoder has 2 layers",
    ),
    "no such layer": (["--unfreeze_vit_layers", "2"], "--unfreeze_vit_layers 2: the vision encoder has 2 layers"),
    "too many layers": (["--unfreeze_vit_layers", "-3"], "--unfreeze_vit_layers -3: the vision encoder has 2 layers"),
    "certain drop": (["--drop_path_rate", "1"], r"--drop_path_rate 1.0 is a probability in \[0, 1\)"),
    "frames": (["--max_num_frame", "7"], "--min_num_frame 8 --max_num_frame 7: fewest and most frames of a video"),
    "no tile": (["--force_image_size", "0"], "a tile of 0 pixels"),
}


@pytest.mark.parametrize(("flags", "message"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_values_out_of_range(build, flags, message):
    with pytest.raises(ValueError, match=message):
        build(*flags)


# -- liger -------------------------------------------------------------------------------------------------------------


def test_use_liger_is_refused_where_it_cannot_run(build):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="--use_liger True needs (the package liger-kernel|a CUDA device)"):
        build("--use_liger", "True")


@pytest.mark.gpu
def test_use_liger_changes_no_loss(build, tiny):
    pytest.importorskip("liger_kernel")
    losses = []
    for flag in ("False", "True"):
        model = build("--use_liger", flag, "--freeze_backbone").cuda().train()
        model.img_context_token_id = -1
        ids = torch.arange(1, 33, device="cuda")[None]
        losses.append(model(input_ids=ids, labels=ids, position_ids=torch.arange(32, device="cuda")[None]).loss)
    assert "Liger" in str(model.language_model)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-3, rtol=1e-3)


# -- all of them -------------------------------------------------------------------------------------------------------

CHECKED = {
    ModelArguments: [*PATHS, *MODEL, "use_liger"],
    DataTrainingArguments: [*SAMPLE, *PACKING, "down_sample_ratio", "max_seq_length", "max_bad_samples", "meta_path"]
    + ["use_data_resampling", "use_packed_ds", "pad2square"],
    TrainingArguments: [*RUN, *HERE, *IDLE, *TRANSFORMERS, *REFUSED, *ONLY],
}


@pytest.mark.parametrize("kind", FINETUNE)
def test_every_field_has_a_check(kind):
    assert {field.name for field in fields(kind)} - set(ACCEPTED) == set(CHECKED[kind])


@pytest.mark.parametrize("name", [*TRANSFORMERS, *IDLE])
def test_transformers_reads_it(name):
    assert reads(name)
