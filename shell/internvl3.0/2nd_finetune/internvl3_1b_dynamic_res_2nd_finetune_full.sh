#!/usr/bin/env bash
# InternVL3-1B (InternViT-300M + Qwen2.5-0.5B): full fine-tuning of the LLM and the projector.
: "${MODEL_PATH:=OpenGVLab/InternVL3-1B}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--learning_rate 1e-5"
. "$(dirname "$0")/common.sh"
