#!/usr/bin/env bash
# InternVL2-4B (InternViT-300M + Phi-3-mini): full fine-tuning of the LLM and the projector.
: "${MODEL_PATH:=./pretrained/InternVL2-4B}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--drop_path_rate 0.1 --learning_rate 4e-5 --weight_decay 0.01 --conv_style phi3-chat"
. "$(dirname "$0")/common.sh"
