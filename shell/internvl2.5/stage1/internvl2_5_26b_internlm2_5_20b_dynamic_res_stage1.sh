#!/usr/bin/env bash
# InternVL2.5-26B (InternViT-6B + InternLM2.5-20B): stage 1, training of the projector.
: "${ZERO_CONFIG:=zero_stage3_config.json}"
FLAGS="
    --vision_path ./pretrained/InternViT-6B-448px-V1-5 --llm_path ./pretrained/internlm2_5-20b-chat
    --weight_decay 0.05
"
. "$(dirname "$0")/common.sh"
