#!/usr/bin/env bash
# InternVL2.5-26B (InternViT-6B + InternLM2.5-20B): LoRA in the vision encoder and the LLM.
# Memory: 51 GB of bf16 weights, sharded by ZeRO-3; 14 GB of activations per sequence of 8192 tokens and 32 tiles.
# Two sequences fit on 80 GB with at least 2 GPUs (26 GB of weights on each; 7 GB with 8 GPUs).
# Learning rate: 5x the 2e-5 of full fine-tuning, which is half that of the models up to 8B.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-26B}" "${ZERO_CONFIG:=zero_stage3_config.json}" "${PER_DEVICE_BATCH_SIZE:=2}"
FLAGS="
    --freeze_backbone True --freeze_llm True --freeze_mlp True --use_backbone_lora 16 --use_llm_lora 16
    --learning_rate 1e-4 --weight_decay 0.05 --loss_reduction_all_gather True
"
. "$(dirname "$0")/../launch.sh"
