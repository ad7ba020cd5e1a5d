#!/usr/bin/env bash
# InternVL3-8B (InternViT-300M + Qwen2.5-7B): full fine-tuning of the LLM and the projector.
: "${MODEL_PATH:=OpenGVLab/InternVL3-8B}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--learning_rate 2e-5"
. "$(dirname "$0")/common.sh"
