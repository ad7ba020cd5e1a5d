#!/usr/bin/env bash
# InternVL3.5-GPT-OSS-20B (InternViT-300M + GPT-OSS-20B): stage 1, pretraining of all parts.
TASK=sft PROJECT_NAME=internvl3_5_gpt_oss_20b_pretrain
: "${MODEL_PATH:=work_dirs/internvl3_5_gpt_oss_20b_pretrain/internvl3_5_gpt_oss_20b_stage0_mlp_warmup}"
FLAGS="
    --drop_path_rate 0.1 --learning_rate 2e-5 --max_steps 15000 --conv_style internvl3_5_gpt_oss
    --use_custom_flash_attn True
"
. "$(dirname "$0")/../internvl3_5.sh"
