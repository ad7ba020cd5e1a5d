#!/usr/bin/env bash
# InternVL2.5-8B (InternViT-300M + InternLM2.5-7B): LoRA in the LLM.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-8B}" "${ZERO_CONFIG:=zero_stage1_config.json}" "${BATCH_SIZE:=16}"
FLAGS="--freeze_llm True --freeze_mlp True --use_llm_lora 16 --learning_rate 4e-5 --weight_decay 0.05"
. "$(dirname "$0")/common.sh"
