#!/usr/bin/env bash
# InternVL-Chat-V1.5 (InternViT-6B + Nous-Hermes-2-Yi-34B): pretraining of the projector.
CLUSTER_GPUS=256
: "${ENTRY:=internvl_chat_pretrain.py}" "${META_PATH:=path/to/pretrain/data.json}"
: "${ZERO_CONFIG:=zero_stage3_config_34b.json}" "${BATCH_SIZE:=2048}" "${PER_DEVICE_BATCH_SIZE:=2}"
FLAGS="
    --vision_path ./pretrained/InternViT-6B-448px-V1-5 --llm_path ./pretrained/Nous-Hermes-2-Yi-34B
    --mlp_path ./pretrained/InternViT-6B-448px-V1-2/mlp_projector/hermes_2_yi_34b.pth
    --freeze_backbone True --freeze_llm True --learning_rate 1e-4 --weight_decay 0.05 --warmup_steps 100
    --conv_style Hermes-2 --group_by_length False --save_total_limit 3
"
. "$(dirname "$0")/../common.sh"
