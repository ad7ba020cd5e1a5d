#!/usr/bin/env bash
# InternVL2-1B (InternViT-300M + Qwen2-0.5B): full fine-tuning of the LLM and the projector.
: "${MODEL_PATH:=./pretrained/InternVL2-1B}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--drop_path_rate 0.1 --learning_rate 4e-5 --weight_decay 0.01 --conv_style Hermes-2"
. "$(dirname "$0")/common.sh"
