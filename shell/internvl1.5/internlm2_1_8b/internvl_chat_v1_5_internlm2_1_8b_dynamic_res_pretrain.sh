#!/usr/bin/env bash
# Mini-InternVL-Chat-2B-V1.5 (InternViT-300M + InternLM2-1.8B): pretraining of the vision encoder and the projector.
CLUSTER_GPUS=128
: "${ENTRY:=internvl_chat_pretrain.py}" "${META_PATH:=path/to/pretrain/data.json}"
: "${ZERO_CONFIG:=zero_stage1_config.json}" "${BATCH_SIZE:=2048}" "${PER_DEVICE_BATCH_SIZE:=8}"
FLAGS="
    --vision_path ./pretrained/InternViT-300M-448px --llm_path ./pretrained/internlm2-chat-1_8b
    --freeze_llm True --drop_path_rate 0.1 --learning_rate 2e-5 --weight_decay 0.01 --warmup_steps 100
    --conv_style internlm2-chat --group_by_length False --save_total_limit 3
"
. "$(dirname "$0")/../common.sh"
