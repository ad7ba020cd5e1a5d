#!/usr/bin/env bash
# Mini-InternVL-Chat-4B-V1.5 (InternViT-300M + Phi-3-mini): full fine-tuning of the LLM and the projector.
: "${MODEL_PATH:=./pretrained/Mini-InternVL-Chat-4B-V1-5}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--freeze_backbone True --drop_path_rate 0.1 --learning_rate 4e-5 --weight_decay 0.05 --conv_style phi3-chat"
. "$(dirname "$0")/../common.sh"
