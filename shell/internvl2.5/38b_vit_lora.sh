#!/usr/bin/env bash
# InternVL2.5-38B (InternViT-6B + Qwen2.5-32B): LoRA in the vision encoder and in the language model.
# 80 GB: 77 GB of bf16 weights are split by ZeRO-3; a row of 8192 tokens and 32 tiles keeps 15 GB of activations.
# Two rows fit from 4 GPUs on (20 GB of weights each; 10 GB on 8).
# Rate: half that of the models up to 8B, as in full fine-tuning (2e-5 there); adapters take 5x as much.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-38B}" "${ZERO_CONFIG:=zero_stage3_config_34b.json}" "${PER_DEVICE_BATCH_SIZE:=2}"
FLAGS="
    --freeze_backbone True --freeze_llm True --freeze_mlp True --use_backbone_lora 16 --use_llm_lora 16
    --learning_rate 1e-4 --weight_decay 0.05
"
. "$(dirname "$0")/../launch.sh"
