#!/usr/bin/env bash
# InternVL2.5-1B (InternViT-300M + Qwen2.5-0.5B): stage 1, training of the projector.
: "${ZERO_CONFIG:=zero_stage1_config.json}"
FLAGS="
    --vision_path ./pretrained/InternViT-300M-448px-V2_5 --llm_path ./pretrained/Qwen2.5-0.5B-Instruct
    --weight_decay 0.01
"
. "$(dirname "$0")/common.sh"
