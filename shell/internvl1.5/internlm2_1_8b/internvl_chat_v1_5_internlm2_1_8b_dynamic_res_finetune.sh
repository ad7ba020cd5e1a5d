#!/usr/bin/env bash
# Mini-InternVL-Chat-2B-V1.5 (InternViT-300M + InternLM2-1.8B): full fine-tuning of all parts.
CLUSTER_GPUS=128
: "${MODEL_PATH:=work_dirs/internvl_chat_v1_5/internvl_chat_v1_5_internlm2_1_8b_dynamic_res_pretrain}"
: "${META_PATH:=path/to/finetune/data.json}" "${ZERO_CONFIG:=zero_stage1_config.json}" "${BATCH_SIZE:=1024}"
FLAGS="
    --drop_path_rate 0.1 --learning_rate 4e-5 --weight_decay 0.01 --conv_style internlm2-chat --max_seq_length 8192
    --save_total_limit 3
"
. "$(dirname "$0")/../common.sh"
