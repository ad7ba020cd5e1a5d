"""Our own recipes and what holds for all: the real parser, from everywhere, with the user's word last."""

import pytest
from helpers.training_runs import ROOT

RECIPES = sorted((ROOT / "shell").glob("*/*_vit_lora.sh"))
VIT_LORA = {  # ZeRO stage, micro-batch, learning rate
    "1b": (2, 8, 2e-4),
    "2b": (2, 8, 2e-4),
    "4b": (2, 4, 2e-4),
    "8b": (2, 4, 2e-4),
    "26b": (3, 2, 1e-4),
    "38b": (3, 2, 1e-4),
    "78b": (3, 1, 1e-4),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_recipe_parses_and_its_batch_comes_out_whole(parsed, recipe, gpus):
    model, data, training = parsed(recipe, GPUS=gpus)
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus
    assert per_step == 128
    assert data.meta_path.startswith(str(ROOT))
    assert training.output_dir == f"work_dirs/{recipe.parent.name}/{recipe.stem}"
    assert len(recipe.read_text().splitlines()) <= 15
    assert model.grad_checkpoint and training.bf16 and data.dynamic_image_size and data.use_thumbnail


@pytest.mark.parametrize("size", VIT_LORA)
def test_vision_lora(parsed, size):
    stage, micro_batch, rate = VIT_LORA[size]
    model, data, training = parsed(ROOT / f"shell/internvl2.5/{size}_vit_lora.sh", GPUS=1)
    assert model.model_name_or_path == f"OpenGVLab/InternVL2_5-{size.upper()}"
    assert model.use_backbone_lora == model.use_llm_lora == 16
    assert model.freeze_backbone and model.freeze_llm and model.freeze_mlp
    assert (data.conv_style, data.max_dynamic_patch, data.max_seq_length) == ("internvl2_5", 6, 8192)
    assert training.deepspeed["zero_optimization"]["stage"] == stage
    assert training.per_device_train_batch_size == micro_batch
    assert training.learning_rate == rate


RECIPE = ROOT / "shell/internvl2.5/8b_vit_lora.sh"


def test_variables_override(parsed, tmp_path):
    meta = tmp_path / "my meta.json"
    meta.write_text("{}")
    model, data, training = parsed(
        RECIPE,
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


def test_no_deepspeed(dry_run):
    assert "--deepspeed" not in dry_run(RECIPE, ZERO_CONFIG="none")[1]


def test_the_users_word_is_last(parsed):
    flags = ("--learning_rate", "1e-5", "--use_llm_lora=8", "--output_dir", "with space", "--max_steps", "3")
    model, _, training = parsed(RECIPE, *flags)
    assert (training.learning_rate, model.use_llm_lora) == (1e-5, 8)
    assert (training.output_dir, training.max_steps) == ("with space", 3)


def test_same_command_from_everywhere(dry_run, tmp_path):
    places = [
        (RECIPE, tmp_path),
        ("8b_vit_lora.sh", RECIPE.parent),
        ("shell/internvl2.5/8b_vit_lora.sh", ROOT),
        ("shell/internvl2.5/8b_vit_lora.sh", ROOT / "internvl_chat"),
        (ROOT / "internvl_chat/shell/internvl2.5/8b_vit_lora.sh", tmp_path),
    ]
    commands = [dry_run(script, cwd=cwd, MASTER_PORT=29999) for script, cwd in places]
    assert all(command == commands[0] for command in commands)
