"""Every recipe parses to the same values as upstream's script.

`recipes.tsv` lists the flags that upstream's scripts pass (its origin: tests/README.md). Each row becomes a command
line. Recipe and command line go through the real parser, and every field of every dataclass must be equal, or be listed
here with the reason.
"""

import csv
import dataclasses
import os
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from helpers.paths import REPO_ROOT

from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.arguments.training import FINETUNE_ARGUMENTS, parse_args

with open(REPO_ROOT / "tests/recipes.tsv", newline="") as table:
    ROWS = {row["path"].split("/shell/")[1]: row for row in csv.DictReader(table, delimiter="\t")}
# Scripts of upstream's data pipeline, whose programs are not in this repository.
NOT_SHIPPED = {path for path, row in ROWS.items() if row["entry"].startswith("tools/")}
RECIPES = {path: row for path, row in ROWS.items() if path not in NOT_SHIPPED}
NOT_UPSTREAM = [
    "launch.sh",
    "describe_recipes.sh",
    "setup.sh",
    "torchrun.py",
    "quickstart.sh",
    "internvl2.5/*_vit_lora.sh",
    "data/*.json",
]
NOT_UPSTREAM += ["slurm/*", "internvl3_5.sh", "*/common.sh"]

# Flags of upstream's scripts that have no column in the table; the column `other` overrides them.
COMMON_FLAGS = {
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
FLAG_BY_COLUMN = {"lr": "learning_rate", "scheduler": "lr_scheduler_type", "zero_config": "deepspeed"}
FLAG_BY_COLUMN |= {
    name: name
    for name in """model_name_or_path vision_path llm_path mlp_path conv_style freeze_llm freeze_mlp freeze_backbone
    use_llm_lora use_backbone_lora unfreeze_vit_layers vision_select_layer max_dynamic_patch max_seq_length weight_decay
    warmup_ratio warmup_steps num_train_epochs max_steps drop_path_rate group_by_length dynamic_image_size use_thumbnail
    ps_version meta_path output_dir""".split()
}
WORK = "work_dirs/internvl_chat_v1_5/internvl_chat_v1_5"
GPT_OSS = "work_dirs/internvl3_5_gpt_oss_20b"
DIFFERENCES = [  # recipes, field, value of ours, reason
    ("*", "overwrite_output_dir", False, "an interrupted run resumes"),
    *(
        (
            f"internvl1.5/{folder}/*_finetune.sh",
            "model_name_or_path",
            f"{WORK}_{folder}_dynamic_res_pretrain",
            "upstream starts from a folder that its pretraining does not write (phi3: from its own output)",
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
        "upstream's full and LoRA fine-tuning of 26B write to the same folder",
    ),
    *(
        ("internvl3_5_*_mpo.sh", field, value, "upstream has the losses of 3.5 hard-coded")
        for field, value in [
            ("loss_type", "sigmoid,bco_pair"),
            ("sigmoid_loss_weight", 0.8),
            ("bco_pair_loss_weight", 0.2),
            ("rpo_alpha", 1.0),
        ]
    ),
]
# Upstream's internvl2.0_mpo starts a program that does not exist.
ENTRY_POINTS = {"internvl_chat_dpo.py": "internvl_chat_mpo.py"}
ENVIRONMENT = {  # variables that upstream's scripts set -> what replaces them
    "LAUNCHER": "compared below",
    "PARTITION": "set by the user: a name on the cluster",
    "PROJECT_NAME": "part of output_dir",
    "NPROC_PER_NODE": "compared below, as GPUS",
    "MASTER_PORT": "a free port",
    "TRITON_CACHE_DIR": "a developer's folder: Triton's default instead",
    "VLLM_CACHE_ROOT": "a developer's folder, and no vLLM",
    "TENSORBOARD_DIR": "not read by anything: the files are in output_dir/runs",
    "JOBLOG": "output_dir/training_log.txt, as in all other recipes",
    "USE_TCS_LOADER": "only 0 is possible: S3 is read with fsspec",
}


def parse_pairs(cell: str) -> dict[str, str]:
    """Parse a cell of the form `NAME=VALUE; NAME=VALUE`."""
    return dict(item.split("=", 1) for item in cell.split("; ") if item)


def read_num_gpus(row) -> int:
    return int(row["GPUS"].removeprefix("NPROC_PER_NODE="))


def make_upstream_argv(path: str, row: dict[str, str]) -> list[str]:
    """Return the flags that upstream's script passes to its entry point."""
    flags = COMMON_FLAGS | {flag: row[column] for column, flag in FLAG_BY_COLUMN.items() if row[column]}
    flags |= parse_pairs(row["packed"]) | parse_pairs(row["other"])
    per_device, accumulation = row["per_device_train_batch_size"], row["gradient_accumulation_steps"]
    if per_device.startswith("$"):
        per_device = row["PER_DEVICE_BATCH_SIZE"]
        accumulation = int(row["BATCH_SIZE"]) // int(per_device) // read_num_gpus(row)
    flags |= {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    names = parse_pairs(row["env"]) | {"CURRENT_PATH": ".", "TASK_NAME": Path(path).stem}
    words = []
    for flag, value in flags.items():
        if value != "<absent>":
            words += [f"--{flag}", re.sub(r"\$\{(\w+)\}", lambda name: names[name[1]], str(value))]
    return words


def parse_fields(argv: list[str], classes) -> dict:
    """Parse flags into all fields, with paths and schedules normalized."""
    fields = {}
    for part in parse_args(argv, classes):
        fields |= {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    for name in ("model_name_or_path", "vision_path", "llm_path", "mlp_path", "meta_path", "output_dir"):
        if fields[name]:
            fields[name] = os.path.normpath(fields[name])
    if (REPO_ROOT / fields["meta_path"]).is_file():
        fields["meta_path"] = str(REPO_ROOT / fields["meta_path"])
    fields["deepspeed"] = argv[len(argv) - argv[::-1].index("--deepspeed")]
    del fields["warmup_ratio"], fields["evaluation_strategy"]  # converted to warmup_steps and eval_strategy
    if fields["max_steps"] > 0:
        del fields["num_train_epochs"]  # has no effect then
    return fields


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_parses_to_the_fields_of_upstreams_script(dry_run, path):
    row = RECIPES[path]
    gpus = read_num_gpus(row)
    cluster = row["launch"] == "srun"
    start, argv = dry_run(REPO_ROOT / "shell" / path, **({"PARTITION": "p"} if cluster else {"GPUS": gpus}))

    assert Path(start[-1]).name == ENTRY_POINTS.get(name := Path(row["entry"]).name, name)
    assert (f"--ntasks={gpus}" if cluster else f"--nproc_per_node={gpus}") in start
    assert f"LAUNCHER={'slurm' if cluster else parse_pairs(row['env'])['LAUNCHER']}" in start
    assert set(parse_pairs(row["env"])) <= set(ENVIRONMENT)

    classes = PREFERENCE_ARGUMENTS if start[-1].endswith("mpo.py") else FINETUNE_ARGUMENTS
    ours, expected = parse_fields(argv, classes), parse_fields(make_upstream_argv(path, row), classes)
    for pattern, field, value, _ in DIFFERENCES:
        if fnmatch(path, pattern):
            assert expected[field] != value or pattern == "*", f"{field} does not differ"
            expected[field] = value
    assert ours == expected
    assert gpus * ours["per_device_train_batch_size"] * ours["gradient_accumulation_steps"] == int(row["global_batch"])


@pytest.mark.parametrize("path", RECIPES)
def test_one_rank_started_by_sh_keeps_the_global_batch_size(dry_run, path):
    _, argv = dry_run(REPO_ROOT / "shell" / path, "--user_flag", "last word", shell="/bin/sh")
    assert argv[-2:] == ["--user_flag", "last word"]
    passed = {}
    for flag, value in zip(argv[::2], argv[1::2], strict=True):
        assert passed.get(flag) != value, f"{flag} {value} is passed twice: a recipe has only flags that differ"
        passed[flag] = value
    global_batch_size = int(passed["--per_device_train_batch_size"]) * int(passed["--gradient_accumulation_steps"])
    assert global_batch_size == int(RECIPES[path]["global_batch"])


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_is_short_and_names_model_and_task(path):
    lines = (REPO_ROOT / "shell" / path).read_text().splitlines()
    assert 3 <= len(lines) <= 15
    assert lines[0] == "#!/usr/bin/env bash"
    assert re.fullmatch(r"# \S*InternVL.+ \(InternViT-\S+ \+ .+\): .+\.", lines[1])
    assert os.access(REPO_ROOT / "shell" / path, os.X_OK)


def test_every_difference_applies_to_a_recipe():
    for pattern, *_ in DIFFERENCES:
        assert any(fnmatch(path, pattern) for path in RECIPES), pattern


def test_every_file_of_shell_has_a_row_or_is_listed():
    shell = REPO_ROOT / "shell"
    files = {str(file.relative_to(shell)) for file in shell.rglob("*") if file.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    assert {file for file in files if not any(fnmatch(file, pattern) for pattern in NOT_UPSTREAM)} == set(RECIPES)
