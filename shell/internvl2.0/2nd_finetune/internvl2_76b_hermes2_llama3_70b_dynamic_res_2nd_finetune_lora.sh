#!/usr/bin/env bash
# InternVL2-76B (InternViT-6B + Hermes-2-Theta-Llama-3-70B): LoRA in the LLM.
: "${MODEL_PATH:=./pretrained/InternVL2-Llama3-76B}" "${ZERO_CONFIG:=zero_stage3_config_100b.json}"
: "${BATCH_SIZE:=16}" "${PER_DEVICE_BATCH_SIZE:=1}"
FLAGS="
    --freeze_llm True --freeze_mlp True --use_llm_lora 16 --learning_rate 2e-5 --weight_decay 0.05
    --conv_style internlm2-chat
"
. "$(dirname "$0")/common.sh"
