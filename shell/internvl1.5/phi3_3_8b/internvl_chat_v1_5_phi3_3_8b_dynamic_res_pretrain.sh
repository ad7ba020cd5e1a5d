#!/usr/bin/env bash
# Mini-InternVL-Chat-4B-V1.5 (InternViT-300M + Phi-3-mini): pretraining of the projector.
CLUSTER_GPUS=128
: "${ENTRY:=internvl_chat_pretrain.py}" "${META_PATH:=path/to/pretrain/data.json}"
: "${ZERO_CONFIG:=zero_stage1_config.json}" "${BATCH_SIZE:=2048}" "${PER_DEVICE_BATCH_SIZE:=8}"
FLAGS="
    --vision_path ./pretrained/InternViT-300M-448px --llm_path ./pretrained/Phi-3-mini-128k-instruct
    --freeze_backbone True --freeze_llm True --learning_rate 2e-4 --weight_decay 0.05 --warmup_steps 100
    --conv_style phi3-chat --group_by_length False --save_total_limit 3
"
. "$(dirname "$0")/../common.sh"
