#!/usr/bin/env bash
# InternVL-Chat-V1.5 (InternViT-6B + Nous-Hermes-2-Yi-34B): full fine-tuning of all parts.
CLUSTER_GPUS=256
: "${MODEL_PATH:=work_dirs/internvl_chat_v1_5/internvl_chat_v1_5_hermes2_yi34b_dynamic_res_pretrain}"
: "${META_PATH:=path/to/finetune/data.json}" "${ZERO_CONFIG:=zero_stage3_config_34b.json}" "${BATCH_SIZE:=1024}"
FLAGS="--drop_path_rate 0.4 --learning_rate 2e-5 --weight_decay 0.05 --conv_style Hermes-2 --save_total_limit 3"
. "$(dirname "$0")/../common.sh"
