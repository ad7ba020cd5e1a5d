#!/usr/bin/env bash
# InternVL2-26B (InternViT-6B + InternLM2-20B): full fine-tuning of the LLM and the projector.
: "${MODEL_PATH:=./pretrained/InternVL2-26B}" "${ZERO_CONFIG:=zero_stage3_config.json}" "${PER_DEVICE_BATCH_SIZE:=2}"
FLAGS="--drop_path_rate 0.4 --learning_rate 2e-5 --weight_decay 0.05 --conv_style internlm2-chat"
. "$(dirname "$0")/common.sh"
