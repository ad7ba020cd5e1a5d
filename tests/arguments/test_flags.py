"""Every flag of the model and of the data has an effect.

Each field has a check, most of them in a table; the last test fails for a field without one.
`test_transformers_flags.py` checks the flags of the training loop.
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers.samples import make_turns
from helpers.training_runs import build_composition_flags, build_run_flags, prepare_trainer

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.model import ModelArguments
from internvl.arguments.per_part import LoraArguments
from internvl.data.skipped_samples import count_max_skipped_samples
from internvl.model.activation_checkpointing import find_transformer_layers, get_recomputed_layer_share
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.lora import is_peft_model
from internvl.train.build_model import build_tokenizer

PATH_FLAGS = {"model_name_or_path": "model", "vision_path": "vit", "llm_path": "llm", "mlp_path": "mlp_projector.pth"}


def trainable_names(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapter_rank(module: torch.nn.Module) -> int:
    return module.peft_config["default"].r if is_peft_model(module) else 0


def recomputed_shares(model: InternVLChatModel) -> list[float]:
    """Return the shares of recomputed layers in vision encoder and LLM."""
    return [get_recomputed_layer_share(part) for part in (model.vision_model, model.language_model)]


# -- weights, trainable parameters, gradient checkpointing -------------------------------------------------------------

# flag -> command line, whether a model shows its effect
MODEL_FLAGS = {
    "freeze_llm": (["--freeze_llm"], lambda m: not trainable_names(m.language_model) and trainable_names(m.mlp1)),
    "freeze_backbone": (
        ["--freeze_backbone"],
        lambda m: not trainable_names(m.vision_model) and trainable_names(m.mlp1),
    ),
    "freeze_mlp": (["--freeze_mlp"], lambda m: not trainable_names(m.mlp1) and trainable_names(m.vision_model)),
    "unfreeze_vit_layers": (
        ["--freeze_backbone", "--unfreeze_vit_layers", "1"],
        lambda m: {n.split("layers.")[-1][0] for n in trainable_names(m.vision_model)} == {"1"},
    ),
    "vision_select_layer": (
        ["--vision_select_layer", "-2"],
        lambda m: m.select_layer == -2 and "encoder.layers.1.ls1" not in trainable_names(m.vision_model),
    ),
    "use_backbone_lora": (["--use_backbone_lora", "2"], lambda m: adapter_rank(m.vision_model) == 2),
    "use_llm_lora": (["--use_llm_lora", "2"], lambda m: adapter_rank(m.language_model) == 2),
    "unfreeze_lm_head": (
        ["--freeze_llm", "--unfreeze_lm_head"],
        lambda m: trainable_names(m.language_model) == {"lm_head.weight"},
    ),
    "grad_checkpoint": (["--grad_checkpoint", "False"], lambda m: not m.is_gradient_checkpointing),
    "vit_grad_checkpoint": (["--vit_grad_checkpoint", "False"], lambda m: recomputed_shares(m) == [0, 1]),
    "grad_checkpoint_ratio": (["--grad_checkpoint_ratio", "0.5"], lambda m: recomputed_shares(m) == [0.5, 0.5]),
    "grad_checkpoint_keep": (
        ["--grad_checkpoint_keep", "matmul"],
        lambda m: all("context_fn" in x._gradient_checkpointing_func.keywords for x in find_transformer_layers(m)),
    ),
    "compile": (
        ["--compile", "True"],
        lambda m: all(any(y._compiled_call_impl for y in x.modules()) for x in find_transformer_layers(m)),
    ),
    "drop_path_rate": (
        ["--drop_path_rate", "0.3"],
        lambda m: getattr(m.vision_model.encoder.layers[-1].drop_path2, "drop_prob", 0) == 0.3,
    ),
    "ps_version": (["--ps_version", "v1"], lambda m: m.ps_version == m.config.ps_version == "v1"),
}


@pytest.mark.parametrize("name", MODEL_FLAGS)
def test_model_flag_has_an_effect(build_from_flags, name):
    flags, has_effect = MODEL_FLAGS[name]
    assert not has_effect(build_from_flags()), "the default has the same effect"
    assert has_effect(build_from_flags(*flags))


@pytest.mark.parametrize("name", PATH_FLAGS)
def test_weights_come_from_the_path(build_from_flags, tiny_inputs, model_parts, name):
    part = {"vision_path": "vision_model", "llm_path": "language_model.model.layers", "mlp_path": "mlp1"}.get(name, "")
    flags = [*build_composition_flags(model_parts), "--mlp_path", f"{model_parts}/mlp_projector.pth"] if part else []
    built = build_from_flags(*flags).get_submodule(part).state_dict()
    source = InternVLChatModel.from_pretrained(tiny_inputs / "model").get_submodule(part).state_dict()
    assert all(torch.equal(tensor, built[key]) for key, tensor in source.items())
    with pytest.raises((ValueError, OSError), match="/nowhere/else/at_all"):
        build_from_flags(*flags, f"--{name}", "/nowhere/else/at_all")


# -- samples -----------------------------------------------------------------------------------------------------------

IMAGE_RECORD = {"image": "a.png", "conversations": make_turns("<image>\nWhat is it?", "A house.")}
VIDEO_RECORD = {"video": "frames", "conversations": make_turns("<video>\nWhat is it?", "A house.")}

# flag -> record, settings, what to compare, its expected values without and with the setting (None: they differ)
SAMPLE_FLAGS = {
    "force_image_size": (IMAGE_RECORD, {"force_image_size": 56}, lambda s: s["pixel_values"].shape[-1], (28, 56)),
    "conv_style": (IMAGE_RECORD, {"conv_style": "Hermes-2"}, lambda s: s["input_ids"].tolist(), None),
    "dynamic_image_size": (IMAGE_RECORD, {"dynamic_image_size": False}, lambda s: len(s["pixel_values"]), (7, 1)),
    "use_thumbnail": (IMAGE_RECORD, {"use_thumbnail": False}, lambda s: len(s["pixel_values"]), (7, 6)),
    "min_dynamic_patch": (IMAGE_RECORD, {"min_dynamic_patch": 12}, lambda s: len(s["pixel_values"]), (7, 13)),
    "max_dynamic_patch": (IMAGE_RECORD, {"max_dynamic_patch": 2}, lambda s: len(s["pixel_values"]), (7, 3)),
    # The number is random between minimum and maximum, and the folder has 20 frames.
    "min_num_frame": (VIDEO_RECORD, {"min_num_frame": 1}, lambda s: len(s["pixel_values"]), (20, 13)),
    "max_num_frame": (VIDEO_RECORD, {"min_num_frame": 3, "max_num_frame": 3}, lambda s: len(s["pixel_values"]), None),
}


@pytest.mark.parametrize("name", SAMPLE_FLAGS)
def test_sample_flag_has_an_effect(make_dataset, name):
    record, settings, measure, expected = SAMPLE_FLAGS[name]
    meta = {"data_augment": False}
    found = [measure(make_dataset(record, meta=meta, max_length=2000, **s).get(0, epoch=0)) for s in ({}, settings)]
    assert found[0] != found[1]
    assert expected is None or tuple(found) == expected


def test_normalize_type(make_dataset):
    clip, siglip = (make_dataset(IMAGE_RECORD, normalize_type=kind)[0]["pixel_values"] for kind in ("clip", "siglip"))
    assert clip.dtype == siglip.dtype == torch.float32 and not torch.equal(clip, siglip)
    assert siglip.min() >= -1 and siglip.max() <= 1


def test_pad2square(make_dataset):
    """Pad images that are not split into tiles, instead of stretching them."""
    settings = {"meta": {"data_augment": False}, "dynamic_image_size": False}
    stretched, padded = (
        make_dataset(IMAGE_RECORD, pad2square=pad, **settings).get(0, 0)["pixel_values"].float()
        for pad in (False, True)
    )
    assert padded.shape == stretched.shape
    assert padded[0, :, 0].std(-1).max() < 1e-5 < stretched[0, :, 0].std(-1).min(), "the first row of pixels is padding"


def test_down_sample_ratio(build_from_flags, model_parts):
    model = build_from_flags(*build_composition_flags(model_parts), "--down_sample_ratio", "0.25")
    assert (model.num_image_token, model.mlp1[0].normalized_shape[0]) == (
        1,
        16 * model.config.vision_config.hidden_size,
    )
    with pytest.raises(ValueError, match="--down_sample_ratio 0.25 is invalid: expected 0.5, which the checkpoint"):
        build_from_flags("--down_sample_ratio", "0.25")
    with pytest.raises(ValueError, match="--down_sample_ratio 0.3 is invalid: expected 1 / n"):
        build_from_flags("--down_sample_ratio", "0.3")


def test_max_seq_length(parse_flags):
    assert build_tokenizer(*parse_flags("--max_seq_length", "77")[:2]).model_max_length == 77


def test_max_bad_samples(parse_flags):
    assert count_max_skipped_samples(parse_flags("--max_bad_samples", "0.1")[1], 50) == 5
    assert count_max_skipped_samples(parse_flags("--max_bad_samples", "7")[1], 50) == 7


def test_meta_path(build_from_flags):
    with pytest.raises(ValueError, match="--meta_path is required"):
        build_from_flags("--meta_path", "")


def test_use_data_resampling(tiny_inputs, tmp_path, monkeypatch):
    """Data sets are drawn by the square root of their size.

    Of 13 and 1 samples, the second set's share is 1 / (1 + sqrt 13): 3 of 14 draws instead of 1.
    """
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    meta = json.loads((tiny_inputs / "meta.json").read_text())["tiny"]
    lines = Path(meta["annotation"]).read_text().splitlines()
    (tmp_path / "one.jsonl").write_text(lines[0])
    sets = {"many": meta, "one": meta | {"annotation": str(tmp_path / "one.jsonl")}}
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    flags = [*build_run_flags(tiny_inputs, tmp_path / "out"), "--meta_path", str(tmp_path / "meta.json")]

    def draws(*more: str) -> list[int]:
        samples = prepare_trainer([*flags, *more]).schedule.plan(0).samples
        return [int((samples < len(lines)).sum()), int((samples == len(lines)).sum())]

    assert draws() == [13, 1]
    assert draws("--use_data_resampling", "True") == [11, 3]
    assert draws("--use_data_resampling", "True", "--group_by_length", "True") == [11, 3]


def prepared(tiny_inputs, tmp_path, *flags: str):
    return prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "out"), *flags])


# flag -> command line, whether the trainer of a packed run shows its effect
PACKING_FLAGS = {
    "use_packed_ds": ([], lambda t: len(t.schedule.plan(0).row_starts) - 1 < 13),
    "max_packed_tokens": (
        ["--max_packed_tokens", "300"],
        lambda t: max_per_row(t, "tokens") <= 300 and padded_length(t) == 300,
    ),
    "num_images_expected": (["--num_images_expected", "7"], lambda t: max_per_row(t, "tiles") == 7),
    "allow_overflow": (
        "--allow_overflow True --max_packed_tokens 110 --max_bad_samples 13".split(),
        lambda t: len(t.train_dataset.pieces) > 0 and max_per_row(t, "tokens") <= 110,
    ),
    "strict_mode": (["--strict_mode", "False"], lambda t: padded_length(t) == max_per_row(t, "tokens")),
    "loss_reduction": (["--loss_reduction", "square"], lambda t: t.model.loss_reduction == "square"),
    "loss_reduction_all_gather": (["--loss_reduction_all_gather", "True"], lambda t: t.loss_weights.all_gather),
    "store_retry_seconds": (
        ["--store_retry_seconds", "7"],
        lambda t: t.train_dataset.datasets[0].data_args.store_retry_seconds == 7,
    ),
    "accept_changed_data": (["--accept_changed_data", "True"], lambda t: t.accept_changed_data),
}


def max_per_row(trainer, what: str) -> int:
    """Return the largest number of tokens or tiles in a row."""
    return trainer.schedule.plan(0).sum_per_row(trainer.schedule.lengths[what]).max()


def padded_length(trainer) -> int:
    """Return the length in tokens of the longest row, padding included."""
    plan = trainer.schedule.plan(0)
    row = int(plan.sum_per_row(trainer.schedule.lengths["tokens"]).argmax())
    return trainer.data_collator([trainer.train_dataset[(0, *plan.get_row_samples(row))]])["input_ids"].shape[1]


@pytest.mark.parametrize("name", PACKING_FLAGS)
def test_packing_flag_has_an_effect(tiny_inputs, tmp_path, monkeypatch, name):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    flags, has_effect = PACKING_FLAGS[name]
    packed = [] if name == "accept_changed_data" else ["--use_packed_ds", "True"]
    assert not has_effect(prepared(tiny_inputs, tmp_path, *(packed if flags else []))), (
        "the default has the same effect"
    )
    assert has_effect(prepared(tiny_inputs, tmp_path, *packed, *flags))


# -- accepted and ignored ----------------------------------------------------------------------------------------------

IGNORED_FLAGS = ["use_fast_tokenizer", "use_custom_flash_attn", "split_annotations", "max_buffer_size", "log_freq"]
IGNORED_FLAGS += ["replacement"]


@pytest.mark.parametrize("name", IGNORED_FLAGS)
def test_help_of_ignored_flags_says_so(name, parse_flags):
    (help,) = (f.metadata["help"] for kind in CHECKED_FLAGS for f in fields(kind) if f.name == name)
    assert help.startswith("accepted for ") and ", ignored: " in help
    model_args, data_args, _ = parse_flags(f"--{name}", "1")
    assert build_tokenizer(model_args, data_args).is_fast


INVALID = {
    "hidden state out of range": (
        ["--vision_select_layer", "-4"],
        "--vision_select_layer -4 is invalid: the vision encoder has 2 layers",
    ),
    "layer out of range": (
        ["--unfreeze_vit_layers", "2"],
        "--unfreeze_vit_layers 2 is invalid: the vision encoder has",
    ),
    "too many layers": (["--unfreeze_vit_layers", "-3"], "--unfreeze_vit_layers -3 is invalid: the vision encoder has"),
    "drop rate 1": (["--drop_path_rate", "1"], r"--drop_path_rate 1.0 is invalid: expected a probability in \[0, 1\)"),
    "too few frames": (["--max_num_frame", "7"], "--max_num_frame 7 is invalid: expected at least --min_num_frame 8"),
    "too many tiles": (
        ["--max_dynamic_patch", "1000000"],
        "--max_dynamic_patch 1000000 is invalid: expected at most 1,024",
    ),
    "too many frames": (["--max_num_frame", "1000000"], "--max_num_frame 1000000 is invalid: expected at most 10,000"),
    "tiles of 0 pixels": (["--force_image_size", "0"], "An image size of 0 pixels is invalid"),
}


@pytest.mark.parametrize(("flags", "message"), INVALID.values(), ids=INVALID)
def test_values_out_of_range_are_refused(build_from_flags, flags, message):
    with pytest.raises(ValueError, match=message):
        build_from_flags(*flags)


# -- liger -------------------------------------------------------------------------------------------------------------


def test_use_liger_is_refused_where_it_is_not_supported(build_from_flags):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="--use_liger True requires (the package liger-kernel|a CUDA device)"):
        build_from_flags("--use_liger", "True")


@pytest.mark.gpu
def test_use_liger_changes_no_loss(build_from_flags, tiny_inputs):
    pytest.importorskip("liger_kernel")
    losses = []
    for flag in ("False", "True"):
        model = build_from_flags("--use_liger", flag, "--freeze_backbone").cuda().train()
        model.img_context_token_id = -1
        ids = torch.arange(1, 33, device="cuda")[None]
        losses.append(model(input_ids=ids, labels=ids, position_ids=torch.arange(32, device="cuda")[None]).loss)
    assert "Liger" in str(model.language_model)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-3, rtol=1e-3)


# -- completeness ------------------------------------------------------------------------------------------------------

LORA_FLAGS = [field.name for field in fields(LoraArguments)] + ["use_mlp_lora", "quantize_backbone", "quantize_llm"]
CHECKED_FLAGS = {
    # LoRA is checked in test_part_settings.py, merging in test_adapter_lifecycle.py.
    ModelArguments: [*PATH_FLAGS, *MODEL_FLAGS, "use_liger", "merge_before_training", *LORA_FLAGS],
    DataTrainingArguments: [
        *SAMPLE_FLAGS,
        *PACKING_FLAGS,
        "down_sample_ratio",
        "max_seq_length",
        "max_bad_samples",
        "meta_path",
    ]
    + ["use_data_resampling", "pad2square", "normalize_type"],
}
CHECKED_FLAGS[ModelArguments] += ["allow_pickle"]  # test_untrusted_checkpoints.py
CHECKED_FLAGS[DataTrainingArguments] += ["allow_outside_root"]  # test_unsafe_records.py
CHECKED_FLAGS[ModelArguments] += ["train_new_tokens"]  # test_new_tokens.py
CHECKED_FLAGS[DataTrainingArguments] += ["keep_surplus_placeholders"]  # test_schema_records.py
CHECKED_FLAGS[DataTrainingArguments] += ["max_image_pixels", "image_background", "upstream_image_decoding"]


@pytest.mark.parametrize("kind", CHECKED_FLAGS)
def test_every_field_has_a_check(kind):
    assert {field.name for field in fields(kind)} - set(IGNORED_FLAGS) == set(CHECKED_FLAGS[kind])
