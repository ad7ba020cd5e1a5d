#!/usr/bin/env bash
# InternVL-Chat-V1.2-Plus (InternViT-6B + Nous-Hermes-2-Yi-34B): LoRA in the LLM.
: "${MODEL_PATH:=./pretrained/InternVL-Chat-V1-2-Plus}" "${BATCH_SIZE:=16}"
FLAGS="
    --freeze_backbone True --freeze_llm True --freeze_mlp True --use_llm_lora 16 --ps_version v1 --max_dynamic_patch 1
"
. "$(dirname "$0")/../common.sh"
