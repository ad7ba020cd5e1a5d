#!/usr/bin/env bash
# InternVL2.5-4B (InternViT-300M + Qwen2.5-3B): LoRA in the LLM.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-4B}" "${ZERO_CONFIG:=zero_stage1_config.json}" "${BATCH_SIZE:=16}"
FLAGS="--freeze_llm True --freeze_mlp True --use_llm_lora 16 --learning_rate 4e-5 --weight_decay 0.01"
. "$(dirname "$0")/common.sh"
