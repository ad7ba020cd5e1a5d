#!/usr/bin/env bash
# InternVL-Chat-V1.5 (InternViT-6B + InternLM2-20B): pretraining of the vision encoder and the projector.
CLUSTER_GPUS=256
: "${ENTRY:=internvl_chat_pretrain.py}" "${META_PATH:=path/to/pretrain/data.json}"
: "${ZERO_CONFIG:=zero_stage3_config.json}" "${BATCH_SIZE:=2048}"
FLAGS="
    --vision_path ./pretrained/InternViT-6B-448px-V1-5 --llm_path ./pretrained/internlm2-chat-20b
    --freeze_llm True --drop_path_rate 0.2 --learning_rate 1e-5 --weight_decay 0.05 --warmup_steps 100
    --conv_style internlm2-chat --group_by_length False --save_total_limit 3
"
. "$(dirname "$0")/../common.sh"
