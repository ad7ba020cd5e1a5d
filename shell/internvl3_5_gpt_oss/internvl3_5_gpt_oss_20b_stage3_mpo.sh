#!/usr/bin/env bash
# InternVL3.5-GPT-OSS-20B (InternViT-300M + GPT-OSS-20B): stage 3, mixed preference optimization of all parts.
TASK=mpo PROJECT_NAME=internvl3_5_gpt_oss_20b_mpo
: "${MODEL_PATH:=work_dirs/internvl3_5_gpt_oss_20b_sft/internvl3_5_gpt_oss_20b_stage2_sft}"
FLAGS="--drop_path_rate 0.1 --conv_style internvl3_5_gpt_oss --use_custom_flash_attn True"
. "$(dirname "$0")/../internvl3_5.sh"
