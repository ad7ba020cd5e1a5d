#!/usr/bin/env bash
# InternVL3-2B (InternViT-300M + Qwen2.5-1.5B): full fine-tuning of the LLM and the projector.
: "${MODEL_PATH:=OpenGVLab/InternVL3-2B}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--learning_rate 2e-5"
. "$(dirname "$0")/common.sh"
