#!/usr/bin/env bash
# InternVL3-9B (InternViT-300M + InternLM3-8B): full fine-tuning of the LLM and the projector.
: "${MODEL_PATH:=OpenGVLab/InternVL3-9B}" "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="--learning_rate 2e-5"
. "$(dirname "$0")/common.sh"
