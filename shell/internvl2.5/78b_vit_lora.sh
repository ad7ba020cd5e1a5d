#!/usr/bin/env bash
# InternVL2.5-78B (InternViT-6B + Qwen2.5-72B): LoRA in the vision encoder and the LLM.
# A step: 32 packed rows of 8192 tokens, one per GPU at a time. `--use_packed_ds False`: 128 padded samples.
# Estimated memory of a row full of images, ZeRO-3: 49 GiB on each of 8 GPUs; 68 GiB on each of 4 GPUs of 80 GB.
# 40 GB: at least 16 GPUs and --max_packed_tokens 4096 (28 GiB). 24 GB: does not fit.
# Learning rate: 5x the 2e-5 of full fine-tuning for 128 samples, which 32 rows hold at 2,000 tokens each.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-78B}" "${ZERO_CONFIG:=zero_stage3_config_100b.json}"
PACKED_FLAGS="--max_packed_tokens 8192" PADDED_MICRO_BATCH_SIZE=1
FLAGS="
    --freeze_backbone True --freeze_llm True --freeze_mlp True --use_backbone_lora 16 --use_llm_lora 16
    --learning_rate 1e-4 --weight_decay 0.05 --loss_reduction_all_gather True
"
. "$(dirname "$0")/../launch.sh"
