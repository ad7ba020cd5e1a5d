"""Recipes pass the real parser; variables and flags override them."""

import pytest
from helpers.paths import REPO_ROOT, VISION_LORA_RECIPE
from helpers.training_runs import TRAIN_LLM_AND_PROJECTOR, read_losses, run_training

from internvl.arguments.validate import validate_arguments

RECIPES = sorted((REPO_ROOT / "shell").glob("*/*_vit_lora.sh"))
CUTS = [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 1, 4)]  # ranks, micro-batch size, gradient accumulation
EXPECTED_BY_SIZE = {  # ZeRO stage, learning rate, recomputed share of the layers, micro-batch size without packing
    "1b": (2, 2e-4, 0, 8),
    "2b": (2, 2e-4, 0.25, 8),
    "4b": (2, 2e-4, 0.5, 4),
    "8b": (2, 2e-4, 0.6, 4),
    "26b": (3, 1e-4, 1, 2),
    "38b": (3, 1e-4, 1, 2),
    "78b": (3, 1e-4, 1, 1),
}


def count_global_batch(training, gpus: int) -> int:
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_recipe_parses_and_keeps_the_global_batch_size(parse_recipe, recipe, gpus):
    model, data, training = parse_recipe(recipe, GPUS=gpus)
    validate_arguments(model, data, training)
    assert count_global_batch(training, gpus) == 32
    assert data.meta_path.startswith(str(REPO_ROOT))
    assert training.output_dir == f"work_dirs/{recipe.parent.name}/{recipe.stem}"
    assert len(recipe.read_text().splitlines()) <= 15
    assert training.bf16 and data.dynamic_image_size and data.use_thumbnail


@pytest.mark.parametrize("size", EXPECTED_BY_SIZE)
def test_flags_of_the_vision_lora_recipes(parse_recipe, size):
    stage, learning_rate, recomputed_share, _ = EXPECTED_BY_SIZE[size]
    model, data, training = parse_recipe(REPO_ROOT / f"shell/internvl2.5/{size}_vit_lora.sh", GPUS=1)
    assert model.model_name_or_path == f"OpenGVLab/InternVL2_5-{size.upper()}"
    assert model.use_backbone_lora == model.use_llm_lora == 16
    assert model.freeze_backbone and model.freeze_llm and model.freeze_mlp
    assert (data.conv_style, data.max_dynamic_patch, data.max_seq_length) == ("internvl2_5", 6, 8192)
    assert (data.use_packed_ds, data.max_packed_tokens, data.strict_mode) == (True, 8192, True)
    assert model.grad_checkpoint * model.grad_checkpoint_ratio == recomputed_share
    assert training.deepspeed["zero_optimization"]["stage"] == stage
    assert training.per_device_train_batch_size == 1
    assert training.learning_rate == learning_rate
    assert (data.loss_reduction, data.loss_reduction_all_gather) == ("token", True)


@pytest.mark.parametrize(
    "words",
    [
        "--use_packed_ds False",
        "--use_packed_ds=no",
        "--use_packed_ds True --use_packed_ds 0",
        "--use-packed-ds False",
    ],
)
@pytest.mark.parametrize("size", EXPECTED_BY_SIZE)
def test_without_packing_a_step_has_128_padded_samples(parse_recipe, size, words):
    """The settings of before the recipes packed, with which a run of then continues."""
    recipe = REPO_ROOT / f"shell/internvl2.5/{size}_vit_lora.sh"
    model, data, training = parse_recipe(recipe, *words.split(), GPUS=2)
    assert not data.use_packed_ds and training.group_by_length
    assert training.per_device_train_batch_size == EXPECTED_BY_SIZE[size][3]
    assert count_global_batch(training, 2) == 128
    assert (model.grad_checkpoint, model.grad_checkpoint_ratio) == (True, 1)
    assert training.learning_rate == EXPECTED_BY_SIZE[size][1]


def test_variables_count_rows_or_samples(parse_recipe):
    variables = {"GPUS": 2, "BATCH_SIZE": 16, "PER_DEVICE_BATCH_SIZE": 2}
    for words in ([], ["--use_packed_ds", "False"]):
        *_, training = parse_recipe(VISION_LORA_RECIPE, *words, **variables)
        assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 4)


def test_no_recomputation_is_one_more_flag(parse_recipe):
    flags = ["--grad_checkpoint", "False"]
    with pytest.raises(ValueError, match="add --grad_checkpoint_ratio 1 if a recipe sets another"):
        validate_arguments(*parse_recipe(VISION_LORA_RECIPE, *flags))
    validate_arguments(*parse_recipe(VISION_LORA_RECIPE, *flags, "--grad_checkpoint_ratio", "1"))


@pytest.mark.multiprocess
def test_loss_does_not_depend_on_how_a_step_is_cut(parse_recipe, tiny_inputs, tmp_path):
    """With the recipes' flags, a step's loss is the mean over its loss tokens."""
    _, data, _ = parse_recipe(VISION_LORA_RECIPE)
    reduction = ["--loss_reduction", data.loss_reduction, "--loss_reduction_all_gather", data.loss_reduction_all_gather]
    losses = {}
    for ranks, micro_batch, accumulation in CUTS:
        cut = ["--per_device_train_batch_size", micro_batch, "--gradient_accumulation_steps", accumulation]
        output = tmp_path / f"{ranks}x{micro_batch}x{accumulation}"
        flags = [
            *TRAIN_LLM_AND_PROJECTOR,
            *reduction,
            *cut,
            *"--max_steps 3 --save_strategy no --no_smoke_save".split(),
        ]
        run_training(tiny_inputs, output, *flags, ranks=ranks)
        losses[output.name] = read_losses(output)
    first, *others = losses.values()
    assert all(other == pytest.approx(first, rel=1e-6) for other in others), losses


def test_variables_override_the_recipe(parse_recipe, tmp_path):
    meta = tmp_path / "my meta.json"
    meta.write_text("{}")
    model, data, training = parse_recipe(
        VISION_LORA_RECIPE,
        MODEL_PATH=tmp_path,
        META_PATH=meta,
        OUTPUT_DIR="out put",
        GPUS=2,
        BATCH_SIZE=12,
        PER_DEVICE_BATCH_SIZE=2,
        ZERO_CONFIG="zero_stage1_config.json",
    )
    assert model.model_name_or_path == str(tmp_path)
    assert (data.meta_path, training.output_dir) == (str(meta), "out put")
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 3)
    assert training.deepspeed["zero_optimization"]["stage"] == 1


def test_zero_config_none_runs_without_deepspeed(dry_run):
    assert "--deepspeed" not in dry_run(VISION_LORA_RECIPE, ZERO_CONFIG="none")[1]


def test_the_users_flags_override_the_recipe(parse_recipe):
    flags = ("--learning_rate", "1e-5", "--use_llm_lora=8", "--output_dir", "with space", "--max_steps", "3")
    model, _, training = parse_recipe(VISION_LORA_RECIPE, *flags)
    assert (training.learning_rate, model.use_llm_lora) == (1e-5, 8)
    assert (training.output_dir, training.max_steps) == ("with space", 3)


def test_the_command_does_not_depend_on_the_folder(dry_run, tmp_path):
    starts = [
        (VISION_LORA_RECIPE, tmp_path),
        ("8b_vit_lora.sh", VISION_LORA_RECIPE.parent),
        ("shell/internvl2.5/8b_vit_lora.sh", REPO_ROOT),
        ("shell/internvl2.5/8b_vit_lora.sh", REPO_ROOT / "internvl_chat"),
        (REPO_ROOT / "internvl_chat/shell/internvl2.5/8b_vit_lora.sh", tmp_path),
    ]
    commands = [dry_run(script, cwd=cwd, MASTER_PORT=29999) for script, cwd in starts]
    assert all(command == commands[0] for command in commands)
