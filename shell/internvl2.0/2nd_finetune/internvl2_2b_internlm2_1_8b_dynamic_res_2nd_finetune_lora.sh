#!/usr/bin/env bash
# InternVL2-2B (InternViT-300M + InternLM2-1.8B): LoRA in the LLM.
: "${MODEL_PATH:=./pretrained/InternVL2-2B}" "${ZERO_CONFIG:=zero_stage1_config.json}" "${BATCH_SIZE:=16}"
FLAGS="
    --freeze_llm True --freeze_mlp True --use_llm_lora 16 --learning_rate 4e-5 --weight_decay 0.01
    --conv_style internlm2-chat
"
. "$(dirname "$0")/common.sh"
