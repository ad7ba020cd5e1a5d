#!/usr/bin/env bash
# InternVL-Chat-V1.2 (InternViT-6B + Nous-Hermes-2-Yi-34B): full fine-tuning of all parts.
CLUSTER_GPUS=64
: "${META_PATH:=shell/data/internvl_1_2_finetune.json}" "${BATCH_SIZE:=512}" "${PER_DEVICE_BATCH_SIZE:=8}"
FLAGS="
    --vision_path ./pretrained/InternViT-6B-448px-V1-2 --llm_path ./pretrained/Nous-Hermes-2-Yi-34B
    --mlp_path ./pretrained/InternViT-6B-448px-V1-2/mlp_projector/hermes_2_yi_34b.pth
    --drop_path_rate 0.4 --max_dynamic_patch 12 --save_total_limit 3
"
. "$(dirname "$0")/../common.sh"
