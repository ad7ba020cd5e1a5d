#!/usr/bin/env bash
# InternVL2-8B (InternViT-300M + InternLM2-7B): mixed preference optimization of all parts.
PROJECT_NAME=internvl_chat_v2_0 CLUSTER_GPUS=256
: "${ENTRY:=internvl_chat_mpo.py}" "${MODEL_PATH:=ckpt/OpenGVLab/InternVL2-8B}" "${META_PATH:=MMPR/meta.json}"
: "${ZERO_CONFIG:=zero_stage1_config.json}" "${BATCH_SIZE:=256}" "${PER_DEVICE_BATCH_SIZE:=1}"
FLAGS="
    --drop_path_rate 0.1 --learning_rate 5e-6 --weight_decay 0.05
    --conv_style internlm2-chat --max_dynamic_patch 12 --max_seq_length 6144 --group_by_length False
    --loss_type sigmoid,bco_pair --sigmoid_loss_weight 0.8 --bco_pair_loss_weight 0.2 --rpo_alpha 1
    --dataloader_num_workers 8 --save_strategy no --save_steps 100 --save_total_limit 100
"
. "$(dirname "$0")/../../launch.sh"
