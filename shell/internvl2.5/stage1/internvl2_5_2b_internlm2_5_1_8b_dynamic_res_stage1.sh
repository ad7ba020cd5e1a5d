#!/usr/bin/env bash
# InternVL2.5-2B (InternViT-300M + InternLM2.5-1.8B): stage 1, training of the projector.
: "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="
    --vision_path ./pretrained/InternViT-300M-448px-V2_5 --llm_path ./pretrained/internlm2_5-1_8b-chat
    --weight_decay 0.01
"
. "$(dirname "$0")/common.sh"
