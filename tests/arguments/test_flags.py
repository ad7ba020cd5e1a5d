"""Every flag of the model and of the data acts or is refused: an entry a field; a field without an entry fails.

An entry is a check with the flags it takes. `test_training_flags.py` has those of the run.
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers.samples import turns
from helpers.training_runs import composed, flags_of, prepare

from internvl.arguments.per_part import LoraArguments
from internvl.arguments.training import DataTrainingArguments, ModelArguments
from internvl.model.activation_checkpointing import recomputed_layer_share, transformer_layers
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.lora import is_peft_model
from internvl.train.build_data import count_allowed_bad_samples
from internvl.train.build_model import build_tokenizer

PATHS = {"model_name_or_path": "model", "vision_path": "vit", "llm_path": "llm", "mlp_path": "mlp_projector.pth"}


def trained(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def adapter_rank(module: torch.nn.Module) -> int:
    return module.peft_config["default"].r if is_peft_model(module) else 0


def shares(model: InternVLChatModel) -> list[float]:
    return [recomputed_layer_share(tower) for tower in (model.vision_model, model.language_model)]


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
    "vit_grad_checkpoint": (["--vit_grad_checkpoint", "False"], lambda m: shares(m) == [0, 1]),
    "checkpoint_every": (["--checkpoint_every", "2"], lambda m: shares(m) == [0.5, 0.5]),
    "checkpoint_keep": (
        ["--checkpoint_keep", "matmul"],
        lambda m: all("context_fn" in layer._gradient_checkpointing_func.keywords for layer in transformer_layers(m)),
    ),
    "compile": (
        ["--compile", "True"],
        lambda m: all(any(part._compiled_call_impl for part in layer.modules()) for layer in transformer_layers(m)),
    ),
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
}


@pytest.mark.parametrize("name", SAMPLE)
def test_sample_flags(make, name):
    record, settings, look, expected = SAMPLE[name]
    meta = {"data_augment": False}
    found = [look(make(record, meta=meta, max_length=2000, **s).get(0, epoch=0)) for s in ({}, settings)]
    assert found[0] != found[1]
    assert expected is None or tuple(found) == expected


def test_normalize_type(make):
    clip, siglip = (make(PICTURE, normalize_type=kind)[0]["pixel_values"] for kind in ("clip", "siglip"))
    assert clip.dtype == siglip.dtype == torch.float32 and not torch.equal(clip, siglip)
    assert siglip.min() >= -1 and siglip.max() <= 1


def test_pad2square(make):
    """Tiles are squares already; an image that is not cut into tiles is padded rather than stretched."""
    settings = {"meta": {"data_augment": False}, "dynamic_image_size": False}
    stretched, padded = (
        make(PICTURE, pad2square=pad, **settings).get(0, 0)["pixel_values"].float() for pad in (False, True)
    )
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
    assert count_allowed_bad_samples(parse("--max_bad_samples", "0.1")[1], 50) == 5
    assert count_allowed_bad_samples(parse("--max_bad_samples", "7")[1], 50) == 7


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
        samples = prepare([*flags, *more]).schedule.plan(0).samples
        return [int((samples < len(lines)).sum()), int((samples == len(lines)).sum())]

    assert draws() == [13, 1]
    assert draws("--use_data_resampling", "True") == [11, 3]
    assert draws("--use_data_resampling", "True", "--group_by_length", "True") == [11, 3]


def prepared(tiny, tmp_path, *flags: str):
    return prepare([*flags_of(tiny, tmp_path / "out"), *flags])


# flag -> flags, what it does to a packed run
PACKED = {
    "use_packed_ds": ([], lambda t: len(t.schedule.plan(0).starts) - 1 < 13),
    "max_packed_tokens": (["--max_packed_tokens", "300"], lambda t: most(t, "tokens") <= 300 and padded(t) == 300),
    "num_images_expected": (["--num_images_expected", "7"], lambda t: most(t, "tiles") == 7),
    "allow_overflow": (
        "--allow_overflow True --max_packed_tokens 110 --max_bad_samples 13".split(),
        lambda t: len(t.train_dataset.parts) > 0 and most(t, "tokens") <= 110,
    ),
    "strict_mode": (["--strict_mode", "False"], lambda t: padded(t) == most(t, "tokens")),
    "loss_reduction": (["--loss_reduction", "square"], lambda t: t.model.loss_reduction == "square"),
    "loss_reduction_all_gather": (["--loss_reduction_all_gather", "True"], lambda t: t.all_gather),
    "accept_changed_data": (["--accept_changed_data", "True"], lambda t: t.accept_changed_data),
}


def most(trainer, what: str) -> int:
    return trainer.schedule.plan(0).totals(getattr(trainer.schedule.lengths, what)).max()


def padded(trainer) -> int:
    """Length of the batch of the longest row."""
    plan = trainer.schedule.plan(0)
    row = int(plan.totals(trainer.schedule.lengths.tokens).argmax())
    return trainer.data_collator([trainer.train_dataset[(0, *plan.row(row))]])["input_ids"].shape[1]


@pytest.mark.parametrize("name", PACKED)
def test_packing_flags(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    flags, acts = PACKED[name]
    packed = [] if name == "accept_changed_data" else ["--use_packed_ds", "True"]
    assert not acts(prepared(tiny, tmp_path, *(packed if flags else []))), "it is so without the flag, too"
    assert acts(prepared(tiny, tmp_path, *packed, *flags))


# -- accepted, because there is nothing to choose here; --help says so -------------------------------------------------

ACCEPTED = ["use_fast_tokenizer", "use_custom_flash_attn", "split_annotations", "max_buffer_size", "log_freq"]
ACCEPTED += ["replacement"]


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_only_accepted_says_so(name, parse):
    (help,) = (f.metadata["help"] for kind in CHECKED for f in fields(kind) if f.name == name)
    assert help.startswith("accepted for ")
    model_args, data_args, _ = parse(f"--{name}", "1")
    assert build_tokenizer(model_args, data_args).is_fast


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

LORA_FLAGS = [field.name for field in fields(LoraArguments)] + ["use_mlp_lora", "quantize_backbone", "quantize_llm"]
CHECKED = {
    # The flags of LoRA are checked in test_part_settings.py, merging in test_life.py.
    ModelArguments: [*PATHS, *MODEL, "use_liger", "merge_before_training", *LORA_FLAGS],
    DataTrainingArguments: [*SAMPLE, *PACKED, "down_sample_ratio", "max_seq_length", "max_bad_samples", "meta_path"]
    + ["use_data_resampling", "pad2square", "normalize_type"],
}
CHECKED[ModelArguments] += ["allow_pickle"]  # test_strange_checkpoints.py
CHECKED[DataTrainingArguments] += ["allow_outside_root"]  # test_strange_data.py


@pytest.mark.parametrize("kind", CHECKED)
def test_every_field_has_a_check(kind):
    assert {field.name for field in fields(kind)} - set(ACCEPTED) == set(CHECKED[kind])
