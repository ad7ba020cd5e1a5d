#!/usr/bin/env bash
# InternVL3-14B (InternViT-300M + Qwen2.5-14B): full fine-tuning of the LLM and the projector.
: "${MODEL_PATH:=OpenGVLab/InternVL3-14B}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--drop_path_rate 0.1 --learning_rate 2e-5"
. "$(dirname "$0")/common.sh"
