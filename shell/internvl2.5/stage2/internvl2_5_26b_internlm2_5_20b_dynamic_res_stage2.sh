#!/usr/bin/env bash
# InternVL2.5-26B (InternViT-6B + InternLM2.5-20B): stage 2, training of all parts.
: "${MODEL_PATH:=work_dirs/internvl_chat_v2_5/internvl2_5_26b_internlm2_5_20b_dynamic_res_stage1_5}"
: "${META_PATH:=path/to/finetune/data/mixture.json}" "${ZERO_CONFIG:=zero_stage3_config.json}"
FLAGS="--drop_path_rate 0.4 --learning_rate 2e-5 --weight_decay 0.05 --max_steps 5500"
. "$(dirname "$0")/common.sh"
