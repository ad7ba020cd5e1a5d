#!/usr/bin/env bash
# InternVL2.5-78B (InternViT-6B + Qwen2.5-72B): LoRA in the LLM.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-78B}" "${ZERO_CONFIG:=zero_stage3_config_100b.json}" "${BATCH_SIZE:=16}"
: "${PER_DEVICE_BATCH_SIZE:=1}"
FLAGS="--freeze_llm True --freeze_mlp True --use_llm_lora 16 --learning_rate 2e-5 --weight_decay 0.05"
. "$(dirname "$0")/common.sh"
