#!/usr/bin/env bash
# InternVL2.5-2B (InternViT-300M + InternLM2.5-1.8B): LoRA in the vision encoder and the LLM.
# Memory: 4 GB of bf16 weights, 2.5 GB of activations per sequence of 8192 tokens and 32 tiles. 8 of them: below 40 GB.
# Learning rate: 5x the 4e-5 of full fine-tuning at this batch size (128), since adapters start at zero.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-2B}" "${ZERO_CONFIG:=zero_stage2_config.json}" "${PER_DEVICE_BATCH_SIZE:=8}"
FLAGS="
    --freeze_backbone True --freeze_llm True --freeze_mlp True --use_backbone_lora 16 --use_llm_lora 16
    --learning_rate 2e-4 --weight_decay 0.01 --loss_reduction_all_gather True
"
. "$(dirname "$0")/../launch.sh"
