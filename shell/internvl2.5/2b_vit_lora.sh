#!/usr/bin/env bash
# InternVL2.5-2B (InternViT-300M + InternLM2.5-1.8B): LoRA in the vision encoder and in the language model.
# 80 GB: 4 GB of bf16 weights; a row of 8192 tokens and 32 tiles keeps 2.5 GB alive: 8 such rows stay below 40 GB.
# Rate: adapters of rank 16 start at zero and take 5x the 4e-5 of full fine-tuning at this batch (128).
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-2B}" "${ZERO_CONFIG:=zero_stage2_config.json}" "${PER_DEVICE_BATCH_SIZE:=8}"
FLAGS="
    --freeze_backbone True --freeze_llm True --freeze_mlp True --use_backbone_lora 16 --use_llm_lora 16
    --learning_rate 2e-4 --weight_decay 0.01
"
. "$(dirname "$0")/../launch.sh"
