"""The eight DeepSpeed configurations: common values and every difference.

They are upstream's, except that the buckets of stage 1 have the size of those of stage 2, 1e8 elements instead of 1e9.
"""

import json

import pytest
from helpers.paths import REPO_ROOT

CONFIG_FILES = sorted((REPO_ROOT / "zero_stage_configs").glob("*.json"))
STAGE_3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": 1e9,
    "stage3_prefetch_bucket_size": 1e9,
    "stage3_param_persistence_threshold": 1e7,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
STAGE_1 = {
    "stage": 1,
    "allgather_partitions": True,
    "allgather_bucket_size": 1e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 1e8,
    "contiguous_gradients": True,
}
BUCKET_SIZES = ("sub_group_size", "reduce_bucket_size", "stage3_prefetch_bucket_size")
LIVE_LIMITS = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
PERSISTENCE_THRESHOLD = "stage3_param_persistence_threshold"
CPU_OFFLOAD = {"device": "cpu", "pin_memory": True}
ZERO_BY_FILE = {
    "zero_stage1_config.json": STAGE_1,
    "zero_stage2_config.json": STAGE_1 | {"stage": 2},
    "zero_stage3_config.json": STAGE_3,
    "zero_stage3_config_34b.json": STAGE_3 | {PERSISTENCE_THRESHOLD: 1e5},
    "zero_stage3_config_70b.json": STAGE_3 | {PERSISTENCE_THRESHOLD: 1e5},
    "zero_stage3_config_100b.json": STAGE_3 | {PERSISTENCE_THRESHOLD: 1e4},
    "zero_stage3_config_100b_1e8.json": STAGE_3 | {PERSISTENCE_THRESHOLD: 1e4} | dict.fromkeys(BUCKET_SIZES, 1e8),
    "zero_stage3_config_100b_1e7_offload.json": STAGE_3
    | {
        PERSISTENCE_THRESHOLD: 1e4,
        "overlap_comm": False,
        "offload_param": CPU_OFFLOAD,
        "offload_optimizer": CPU_OFFLOAD,
    }
    | dict.fromkeys(BUCKET_SIZES, 1e7)
    | dict.fromkeys(LIVE_LIMITS, 1e8),
}
COMMON = {
    "fp16": {
        "enabled": "auto",
        "auto_cast": True,
        "loss_scale": 0,
        "initial_scale_power": 32,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"},
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def test_all_files_of_upstream_exist():
    assert {f.name for f in CONFIG_FILES} == set(ZERO_BY_FILE)


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda f: f.stem)
def test_values_of_a_config(file):
    breakdown = {"wall_clock_breakdown": file.name != "zero_stage2_config.json"}
    assert json.loads(file.read_text()) == COMMON | breakdown | {"zero_optimization": ZERO_BY_FILE[file.name]}


@pytest.mark.parametrize("file", sorted((REPO_ROOT / "shell/data").glob("*.json")), ids=lambda f: f.stem)
def test_meta_files_have_the_required_keys(file):
    for entry in json.loads(file.read_text()).values():
        assert {"root", "annotation", "repeat_time", "data_augment"} <= set(entry)
        assert entry["annotation"].endswith(".jsonl")
