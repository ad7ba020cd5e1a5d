#!/usr/bin/env bash
# InternVL-Chat-V1.5 (InternViT-6B + InternLM2-20B): full fine-tuning of all parts.
CLUSTER_GPUS=256
: "${MODEL_PATH:=work_dirs/internvl_chat_v1_5/internvl_chat_v1_5_internlm2_20b_dynamic_res_pretrain}"
: "${META_PATH:=path/to/finetune/data.json}" "${ZERO_CONFIG:=zero_stage3_config.json}" "${BATCH_SIZE:=1024}"
FLAGS="--drop_path_rate 0.4 --learning_rate 2e-5 --weight_decay 0.05 --conv_style internlm2-chat --save_total_limit 3"
. "$(dirname "$0")/../common.sh"
