#!/usr/bin/env bash
# InternVL2.5-8B (InternViT-300M + InternLM2.5-7B): LoRA in the vision encoder and in the language model.
# 80 GB: 16 GB of bf16 weights; a row of 8192 tokens and 32 tiles keeps 4 GB alive: 4 such rows stay below 50 GB.
# ZeRO-2: only the adapters (40M parameters, 16 bytes each) have optimizer states, so weights need not be split.
# Rate: adapters of rank 16 start at zero and take 5x the 4e-5 of full fine-tuning at this batch (128).
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-8B}" "${ZERO_CONFIG:=zero_stage2_config.json}" "${PER_DEVICE_BATCH_SIZE:=4}"
FLAGS="
    --freeze_backbone True --freeze_llm True --freeze_mlp True --use_backbone_lora 16 --use_llm_lora 16
    --learning_rate 2e-4 --weight_decay 0.05
"
. "$(dirname "$0")/../launch.sh"
