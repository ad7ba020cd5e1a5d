#!/usr/bin/env bash
# InternVL2.5-26B (InternViT-6B + InternLM2.5-20B): LoRA in the vision encoder and in the language model.
# 80 GB: 51 GB of bf16 weights are split by ZeRO-3; a row of 8192 tokens and 32 tiles keeps 14 GB of activations.
# Two rows fit from 2 GPUs on (26 GB of weights each; 7 GB on 8).
# Rate: half that of the models up to 8B, as in full fine-tuning (2e-5 there); adapters take 5x as much.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-26B}" "${ZERO_CONFIG:=zero_stage3_config.json}" "${PER_DEVICE_BATCH_SIZE:=2}"
FLAGS="
    --freeze_backbone True --freeze_llm True --freeze_mlp True --use_backbone_lora 16 --use_llm_lora 16
    --learning_rate 1e-4 --weight_decay 0.05
"
. "$(dirname "$0")/../launch.sh"
