#!/usr/bin/env bash
# InternVL2.5-78B (InternViT-6B + Qwen2.5-72B): full fine-tuning of the LLM and the projector.
CLUSTER_GPUS=32
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-78B}" "${ZERO_CONFIG:=zero_stage3_config_100b.json}"
: "${PER_DEVICE_BATCH_SIZE:=1}"
FLAGS="--drop_path_rate 0.4 --learning_rate 2e-5 --weight_decay 0.05"
. "$(dirname "$0")/common.sh"
