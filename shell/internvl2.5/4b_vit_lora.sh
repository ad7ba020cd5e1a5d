#!/usr/bin/env bash
# InternVL2.5-4B (InternViT-300M + Qwen2.5-3B): LoRA in the vision encoder and the LLM.
# Memory: 7 GB of bf16 weights, 3 GB of activations per sequence of 8192 tokens and 32 tiles. 4 of them: below 35 GB.
# Learning rate: 5x the 4e-5 of full fine-tuning at this batch size (128), since adapters start at zero.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-4B}" "${ZERO_CONFIG:=zero_stage2_config.json}" "${PER_DEVICE_BATCH_SIZE:=4}"
FLAGS="
    --freeze_backbone True --freeze_llm True --freeze_mlp True --use_backbone_lora 16 --use_llm_lora 16
    --learning_rate 2e-4 --weight_decay 0.01 --loss_reduction_all_gather True
"
. "$(dirname "$0")/../launch.sh"
