#!/usr/bin/env bash
# InternVL2.5-8B (InternViT-300M + InternLM2.5-7B): stage 1, training of the projector.
: "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="
    --vision_path ./pretrained/InternViT-300M-448px --llm_path ./pretrained/internlm2_5-7b-chat --weight_decay 0.05
"
. "$(dirname "$0")/common.sh"
