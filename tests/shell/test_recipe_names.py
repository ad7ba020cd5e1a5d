"""Recipes by name, and their settings without running them."""

import pytest
from helpers.paths import REPO_ROOT

from internvl.arguments.deepspeed_config import get_zero_stage
from internvl.recipes import RECIPE_DIR, describe_recipes, find_recipe, list_recipes

SHARED = {"common.sh", "internvl3_5.sh", "launch.sh", "setup.sh", "quickstart.sh", "describe_recipes.sh"}
# One of each kind: of each generation, LoRA and full, packed and padded, composed, of pairs.
COMPARED = """
    internvl1.2/hermes2_yi34b/internvl_chat_v1_2_hermes2_yi34b_448_res_finetune
    internvl1.5/2nd_finetune/internvl_chat_v1_5_internlm2_20b_dynamic_res_2nd_finetune_lora
    internvl2.0/2nd_finetune/internvl2_1b_qwen2_0_5b_dynamic_res_2nd_finetune_full
    internvl2.5/8b_vit_lora internvl2.5/78b_vit_lora
    internvl2.5/2nd_finetune/internvl2_5_38b_dynamic_res_2nd_finetune_full
    internvl2.5/stage1/internvl2_5_38b_qwen2_5_32b_dynamic_res_stage1
    internvl3.0/mpo/internvl3_8b_mpo
    internvl3_5_qwen3/internvl3_5_8b_sft
    internvl3_5_gpt_oss/internvl3_5_gpt_oss_20b_stage2_sft
""".split()


def test_all_recipes_are_listed():
    scripts = {path for path in (REPO_ROOT / "shell").rglob("*.sh") if path.name not in SHARED}
    assert {RECIPE_DIR / f"{name}.sh" for name in list_recipes()} == scripts
    assert [row.recipe for row in describe_recipes()] == list_recipes()


@pytest.mark.parametrize("name", COMPARED)
def test_settings_are_those_that_the_recipe_passes(parse_recipe, name):
    (settings,) = [row for row in describe_recipes() if row.recipe == name]
    model, data, training = parse_recipe(RECIPE_DIR / f"{name}.sh", GPUS=1)
    assert settings.model == (model.model_name_or_path or model.llm_path)
    ranks = {"vision": model.use_backbone_lora, "projector": model.use_mlp_lora, "LLM": model.use_llm_lora}
    assert settings.lora == (", ".join(f"{part} {rank}" for part, rank in ranks.items() if rank) or "no")
    assert settings.zero == str(get_zero_stage(training.deepspeed))
    assert settings.packing == ("yes" if data.use_packed_ds else "no")


def test_settings_do_not_depend_on_the_environment(monkeypatch):
    rows = describe_recipes("8b_vit_lora")
    for name in ("MODEL_PATH", "ZERO_CONFIG", "FLAGS", "PACKED_FLAGS"):
        monkeypatch.setenv(name, "other")
    assert describe_recipes("8b_vit_lora") == rows


@pytest.mark.parametrize(
    "name", ["internvl2.5/8b_vit_lora", "8b_vit_lora", "8b_vit_lora.sh", "shell/internvl2.5/8b_vit_lora.sh"]
)
def test_find_a_recipe(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == RECIPE_DIR / "internvl2.5/8b_vit_lora.sh"


def test_a_script_of_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "8b_vit_lora.sh").write_text(". shell/launch.sh\n")
    assert find_recipe("8b_vit_lora.sh") == tmp_path / "8b_vit_lora.sh"


@pytest.mark.parametrize(
    "name", ["", "..", "../launch", "launch", "common", "internvl2.5/stage1/common.sh", "internvl2.5", "/"]
)
def test_what_is_not_a_recipe(name):
    with pytest.raises(ValueError, match="^(unknown recipe:|recipe .* is ambiguous)"):
        find_recipe(name)
