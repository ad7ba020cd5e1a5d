#!/usr/bin/env bash
# InternVL2.5-4B (InternViT-300M + Qwen2.5-3B): LoRA in the vision encoder and the LLM.
# A step: 32 packed rows of 8192 tokens, one per GPU at a time. `--use_packed_ds False`: 128 padded samples.
# Estimated memory of a row full of images, every 2nd layer recomputed: 46 GiB, for 80 GB. (tools/estimate_memory.py)
# 40 GB: --grad_checkpoint_ratio 0.8 (25 GiB). 24 GB: --grad_checkpoint_ratio 1 (13 GiB).
# Learning rate: 5x the 4e-5 of full fine-tuning for 128 samples, which 32 rows hold at 2,000 tokens each.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-4B}" "${ZERO_CONFIG:=zero_stage2_config.json}"
PACKED_FLAGS="--max_packed_tokens 8192 --grad_checkpoint_ratio 0.5" PADDED_MICRO_BATCH_SIZE=4
FLAGS="
    --freeze_backbone True --freeze_llm True --freeze_mlp True --use_backbone_lora 16 --use_llm_lora 16
    --learning_rate 2e-4 --weight_decay 0.01 --loss_reduction_all_gather True
"
. "$(dirname "$0")/../launch.sh"
