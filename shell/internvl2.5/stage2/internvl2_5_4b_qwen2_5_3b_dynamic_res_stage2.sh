#!/usr/bin/env bash
# InternVL2.5-4B (InternViT-300M + Qwen2.5-3B): stage 2, training of all parts.
: "${MODEL_PATH:=work_dirs/internvl_chat_v2_5/internvl2_5_4b_qwen2_5_3b_dynamic_res_stage1}"
: "${META_PATH:=path/to/finetune/data/mixture_2x.json}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--drop_path_rate 0.1 --learning_rate 4e-5 --weight_decay 0.01 --max_steps 11000"
. "$(dirname "$0")/common.sh"
