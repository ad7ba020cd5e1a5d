#!/usr/bin/env bash
# InternVL2-8B (InternViT-300M + InternLM2-7B): LoRA in the LLM.
: "${MODEL_PATH:=./pretrained/InternVL2-8B}" "${ZERO_CONFIG:=zero_stage1_config.json}" "${BATCH_SIZE:=16}"
FLAGS="
    --freeze_llm True --freeze_mlp True --use_llm_lora 16 --learning_rate 4e-5 --weight_decay 0.05
    --conv_style internlm2-chat
"
. "$(dirname "$0")/common.sh"
