#!/usr/bin/env bash
# InternVL2.5-2B (InternViT-300M + InternLM2.5-1.8B): stage 2, training of all parts.
: "${MODEL_PATH:=work_dirs/internvl_chat_v2_5/internvl2_5_2b_internlm2_5_1_8b_dynamic_res_stage1}"
: "${META_PATH:=path/to/finetune/data/mixture_4x.json}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--drop_path_rate 0.1 --learning_rate 4e-5 --weight_decay 0.01 --max_steps 22000"
. "$(dirname "$0")/common.sh"
