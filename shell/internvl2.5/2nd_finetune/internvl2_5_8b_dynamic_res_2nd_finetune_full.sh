#!/usr/bin/env bash
# InternVL2.5-8B (InternViT-300M + InternLM2.5-7B): full fine-tuning of the LLM and the projector.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-8B}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--drop_path_rate 0.1 --learning_rate 4e-5 --weight_decay 0.05"
. "$(dirname "$0")/common.sh"
