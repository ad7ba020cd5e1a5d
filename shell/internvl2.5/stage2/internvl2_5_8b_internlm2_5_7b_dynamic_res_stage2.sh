#!/usr/bin/env bash
# InternVL2.5-8B (InternViT-300M + InternLM2.5-7B): stage 2, training of all parts.
: "${MODEL_PATH:=work_dirs/internvl_chat_v2_5/internvl2_5_8b_internlm2_5_7b_dynamic_res_stage1_5}"
: "${META_PATH:=path/to/finetune/data/mixture.json}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--drop_path_rate 0.1 --learning_rate 4e-5 --weight_decay 0.05 --max_steps 5500"
. "$(dirname "$0")/common.sh"
