#!/usr/bin/env bash
# InternVL2-8B (InternViT-300M + InternLM2-7B): full fine-tuning of the LLM and the projector.
: "${MODEL_PATH:=./pretrained/InternVL2-8B}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--drop_path_rate 0.1 --learning_rate 4e-5 --weight_decay 0.05 --conv_style internlm2-chat"
. "$(dirname "$0")/common.sh"
