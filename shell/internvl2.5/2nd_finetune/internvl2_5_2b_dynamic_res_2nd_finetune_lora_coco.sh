#!/usr/bin/env bash
# InternVL2.5-2B (InternViT-300M + InternLM2.5-1.8B): LoRA in the LLM, on COCO captions.
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-2B}" "${META_PATH:=shell/data/coco_caption.json}"
: "${ZERO_CONFIG:=zero_stage1_config.json}" "${BATCH_SIZE:=512}"
FLAGS="--freeze_llm True --freeze_mlp True --use_llm_lora 128 --learning_rate 4e-5 --weight_decay 0.01"
. "$(dirname "$0")/common.sh"
