#!/usr/bin/env bash
# InternVL2.5-78B (InternViT-6B + Qwen2.5-72B): LoRA in the vision encoder and the LLM.
# Memory: 157 GB of bf16 weights, sharded by ZeRO-3; 20 GB of activations per sequence of 8192 tokens and 32 tiles.
# One sequence fits on 80 GB with at least 4 GPUs (40 GB of weights on each; 20 GB with 8 GPUs).
# Learning rate: 5x the 2e-5 of full fine-tuning, which is half that of the models up to 8B.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-78B}" "${ZERO_CONFIG:=zero_stage3_config_100b.json}"
: "${PER_DEVICE_BATCH_SIZE:=1}"
FLAGS="
    --freeze_backbone True --freeze_llm True --freeze_mlp True --use_backbone_lora 16 --use_llm_lora 16
    --learning_rate 1e-4 --weight_decay 0.05 --loss_reduction_all_gather True
"
. "$(dirname "$0")/../launch.sh"
