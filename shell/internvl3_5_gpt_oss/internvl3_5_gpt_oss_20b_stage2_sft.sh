#!/usr/bin/env bash
# InternVL3.5-GPT-OSS-20B (InternViT-300M + GPT-OSS-20B): stage 2, supervised fine-tuning of all parts.
TASK=sft PROJECT_NAME=internvl3_5_gpt_oss_20b_sft
: "${MODEL_PATH:=work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage1_pretrain}"
FLAGS="--drop_path_rate 0.1 --learning_rate 8e-5 --conv_style internvl3_5_gpt_oss --use_custom_flash_attn True"
. "$(dirname "$0")/../internvl3_5.sh"
