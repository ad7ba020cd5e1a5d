#!/usr/bin/env bash
# InternVL2.5-38B (InternViT-6B + Qwen2.5-32B): full fine-tuning of the LLM and the projector.
CLUSTER_GPUS=16
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-38B}" "${ZERO_CONFIG:=zero_stage3_config_34b.json}"
: "${PER_DEVICE_BATCH_SIZE:=2}"
FLAGS="--drop_path_rate 0.4 --learning_rate 2e-5 --weight_decay 0.05"
. "$(dirname "$0")/common.sh"
