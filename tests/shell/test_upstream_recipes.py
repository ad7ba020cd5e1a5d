"""Every upstream script at its name: what it parses to is what upstream's own command line parses to.

`recipes.tsv` says what upstream's scripts pass (its origin: tests/README.md). Each row becomes that command line; both
go through the real parser, and every field of every dataclass must agree, or be listed here with the reason.
"""

import csv
import dataclasses
import os
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from helpers.training_runs import ROOT

from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.arguments.training import FINETUNE_ARGUMENTS, parse_args

with open(ROOT / "tests/recipes.tsv", newline="") as table:
    ROWS = {row["path"].split("/shell/")[1]: row for row in csv.DictReader(table, delimiter="\t")}
NOT_SHIPPED = {path for path, row in ROWS.items() if row["entry"].startswith("tools/")}  # they run the data pipeline
RECIPES = {path: row for path, row in ROWS.items() if path not in NOT_SHIPPED}
OURS = ["launch.sh", "setup.sh", "torchrun.py", "quickstart.sh", "internvl2.5/*_vit_lora.sh", "data/*.json"]
OURS += ["slurm/*", "internvl3_5.sh", "*/common.sh"]  # what the recipes of a folder share

# What upstream's scripts pass without a column of its own, unless `other` says something else.
COMMON = {
    "overwrite_output_dir": "True",
    "force_image_size": "448",
    "down_sample_ratio": "0.5",
    "dataloader_num_workers": "4",
    "bf16": "True",
    "evaluation_strategy": "no",
    "save_strategy": "steps",
    "save_steps": "200",
    "save_total_limit": "1",
    "logging_steps": "1",
    "do_train": "True",
    "grad_checkpoint": "True",
    "report_to": "tensorboard",
}
COLUMNS = {"lr": "learning_rate", "scheduler": "lr_scheduler_type", "zero_config": "deepspeed"}
COLUMNS |= {
    name: name
    for name in """model_name_or_path vision_path llm_path mlp_path conv_style freeze_llm freeze_mlp freeze_backbone
    use_llm_lora use_backbone_lora unfreeze_vit_layers vision_select_layer max_dynamic_patch max_seq_length weight_decay
    warmup_ratio warmup_steps num_train_epochs max_steps drop_path_rate group_by_length dynamic_image_size use_thumbnail
    ps_version meta_path output_dir""".split()
}
WORK = "work_dirs/internvl_chat_v1_5/internvl_chat_v1_5"
GPT_OSS = "work_dirs/internvl3_5_gpt_oss_20b"
DIFFERENCES = [  # recipes, field, ours, why
    ("*", "overwrite_output_dir", False, "a run that was cut off goes on where it was"),
    *(
        (
            f"internvl1.5/{folder}/*_finetune.sh",
            "model_name_or_path",
            f"{WORK}_{folder}_dynamic_res_pretrain",
            "upstream starts from a folder that its pretraining does not write; phi3's from its own output",
        )
        for folder in ("hermes2_yi34b", "internlm2_1_8b", "internlm2_20b", "phi3_3_8b")
    ),
    (
        "internvl3_5_gpt_oss/*_stage3_mpo.sh",
        "model_name_or_path",
        f"{GPT_OSS}_sft/internvl3_5_gpt_oss_20b_stage2_sft",
        "upstream starts from a folder that stage 2 does not write",
    ),
    (
        "internvl2.5/2nd_finetune/internvl2_5_26b_*_full.sh",
        "output_dir",
        "work_dirs/internvl_chat_v2_5/internvl2_5_26b_dynamic_res_2nd_finetune_full",
        "upstream's full and LoRA fine-tuning of 26B write into one folder",
    ),
    *(
        ("internvl3_5_*_mpo.sh", field, value, "upstream writes the losses of 3.5 into its code")
        for field, value in [
            ("loss_type", "sigmoid,bco_pair"),
            ("sigmoid_loss_weight", 0.8),
            ("bco_pair_loss_weight", 0.2),
            ("rpo_alpha", 1.0),
        ]
    ),
]
ENTRIES = {"internvl_chat_dpo.py": "internvl_chat_mpo.py"}  # upstream's internvl2.0_mpo names one that does not exist
ENVIRONMENT = {  # what upstream's scripts set, and where it is here
    "LAUNCHER": "compared below",
    "PARTITION": "a cluster's name: the user says it",
    "PROJECT_NAME": "part of output_dir",
    "NPROC_PER_NODE": "compared below, as GPUS",
    "MASTER_PORT": "a free one",
    "TRITON_CACHE_DIR": "a developer's folder: Triton's default instead",
    "VLLM_CACHE_ROOT": "a developer's folder, and no vLLM",
    "TENSORBOARD_DIR": "read by nothing: the files lie in output_dir/runs",
    "JOBLOG": "output_dir/training_log.txt, as in all other recipes",
    "USE_TCS_LOADER": "0 is the only choice: S3 goes through fsspec",
}


def pairs(cell: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in cell.split("; ") if item)


def gpus_of(row) -> int:
    return int(row["GPUS"].removeprefix("NPROC_PER_NODE="))


def upstream_argv(path: str, row: dict[str, str]) -> list[str]:
    """The words that upstream's script puts behind its entry."""
    flags = COMMON | {flag: row[column] for column, flag in COLUMNS.items() if row[column]}
    flags |= pairs(row["packed"]) | pairs(row["other"])
    per_device, accumulation = row["per_device_train_batch_size"], row["gradient_accumulation_steps"]
    if per_device.startswith("$"):
        per_device = row["PER_DEVICE_BATCH_SIZE"]
        accumulation = int(row["BATCH_SIZE"]) // int(per_device) // gpus_of(row)
    flags |= {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    names = pairs(row["env"]) | {"CURRENT_PATH": ".", "TASK_NAME": Path(path).stem}
    words = []
    for flag, value in flags.items():
        if value != "<absent>":
            words += [f"--{flag}", re.sub(r"\$\{(\w+)\}", lambda name: names[name[1]], str(value))]
    return words


def fields(argv: list[str], classes) -> dict:
    """What the training sees, with paths and schedules in one spelling."""
    seen = {}
    for part in parse_args(argv, classes):
        seen |= {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    for name in ("model_name_or_path", "vision_path", "llm_path", "mlp_path", "meta_path", "output_dir"):
        if seen[name]:
            seen[name] = os.path.normpath(seen[name])
    if (ROOT / seen["meta_path"]).is_file():
        seen["meta_path"] = str(ROOT / seen["meta_path"])
    seen["deepspeed"] = argv[len(argv) - argv[::-1].index("--deepspeed")]
    del seen["warmup_ratio"], seen["evaluation_strategy"]  # the parser has put them into warmup_steps, eval_strategy
    if seen["max_steps"] > 0:
        del seen["num_train_epochs"]
    return seen


@pytest.mark.parametrize("path", RECIPES)
def test_it_parses_to_what_upstreams_script_parses_to(dry_run, path):
    row = RECIPES[path]
    gpus = gpus_of(row)
    cluster = row["launch"] == "srun"
    start, argv = dry_run(ROOT / "shell" / path, **({"PARTITION": "p"} if cluster else {"GPUS": gpus}))

    assert Path(start[-1]).name == ENTRIES.get(name := Path(row["entry"]).name, name)
    assert (f"--ntasks={gpus}" if cluster else f"--nproc_per_node={gpus}") in start
    assert f"LAUNCHER={'slurm' if cluster else pairs(row['env'])['LAUNCHER']}" in start
    assert set(pairs(row["env"])) <= set(ENVIRONMENT)

    classes = PREFERENCE_ARGUMENTS if start[-1].endswith("mpo.py") else FINETUNE_ARGUMENTS
    ours, theirs = fields(argv, classes), fields(upstream_argv(path, row), classes)
    for pattern, field, value, _ in DIFFERENCES:
        if fnmatch(path, pattern):
            assert theirs[field] != value or pattern == "*", f"{field} does not differ"
            theirs[field] = value
    assert ours == theirs
    assert gpus * ours["per_device_train_batch_size"] * ours["gradient_accumulation_steps"] == int(row["global_batch"])


@pytest.mark.parametrize("path", RECIPES)
def test_sh_on_one_machine_trains_the_same_batch(dry_run, path):
    _, argv = dry_run(ROOT / "shell" / path, "--the_users", "last word", shell="/bin/sh")
    assert argv[-2:] == ["--the_users", "last word"]
    said = {}
    for flag, value in zip(argv[::2], argv[1::2], strict=True):
        assert said.get(flag) != value, f"{flag} {value} is said twice: a recipe holds only what differs"
        said[flag] = value
    per_rank = int(said["--per_device_train_batch_size"]) * int(said["--gradient_accumulation_steps"])
    assert per_rank == int(RECIPES[path]["global_batch"])


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_is_short_and_says_what_it_is(path):
    lines = (ROOT / "shell" / path).read_text().splitlines()
    assert 3 <= len(lines) <= 15
    assert lines[0] == "#!/usr/bin/env bash"
    assert re.fullmatch(r"# \S*InternVL.+ \(InternViT-\S+ \+ .+\): .+\.", lines[1])
    assert os.access(ROOT / "shell" / path, os.X_OK)


def test_every_difference_is_some_recipes():
    for pattern, *_ in DIFFERENCES:
        assert any(fnmatch(path, pattern) for path in RECIPES), pattern


def test_every_file_has_a_row_or_is_ours():
    files = {str(f.relative_to(ROOT / "shell")) for f in (ROOT / "shell").rglob("*") if f.is_file()}
    assert {f for f in files if not any(fnmatch(f, pattern) for pattern in OURS) and "__pycache__" not in f} == set(
        RECIPES
    )
