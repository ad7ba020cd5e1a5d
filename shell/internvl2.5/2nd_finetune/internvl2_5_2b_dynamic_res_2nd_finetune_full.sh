#!/usr/bin/env bash
# InternVL2.5-2B (InternViT-300M + InternLM2.5-1.8B): full fine-tuning of the LLM and the projector.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-2B}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--drop_path_rate 0.1 --learning_rate 4e-5 --weight_decay 0.01"
. "$(dirname "$0")/common.sh"
