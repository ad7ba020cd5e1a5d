#!/usr/bin/env bash
# InternVL2.5-78B (InternViT-6B + Qwen2.5-72B): stage 2, training of all parts.
: "${MODEL_PATH:=work_dirs/internvl_chat_v2_5/internvl2_5_78b_qwen2_5_72b_dynamic_res_stage1}"
: "${META_PATH:=path/to/finetune/data/mixture.json}" "${ZERO_CONFIG:=zero_stage3_config_100b_1e8.json}"
FLAGS="--drop_path_rate 0.4 --learning_rate 2e-5 --weight_decay 0.05 --max_steps 5500 --use_liger True"
. "$(dirname "$0")/common.sh"
