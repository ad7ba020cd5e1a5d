#!/usr/bin/env bash
# InternVL2.5-78B (InternViT-6B + Qwen2.5-72B): stage 1, training of the projector.
: "${ZERO_CONFIG:=zero_stage3_config_70b.json}"
FLAGS="
    --vision_path ./pretrained/InternViT-6B-448px-V2_5 --llm_path ./pretrained/Qwen2.5-72B-Instruct
    --weight_decay 0.05
"
. "$(dirname "$0")/common.sh"
