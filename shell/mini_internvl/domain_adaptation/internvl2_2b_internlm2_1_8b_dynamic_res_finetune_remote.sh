#!/usr/bin/env bash
# InternVL2-2B (InternViT-300M + InternLM2-1.8B): domain adaptation of all parts to remote sensing.
: "${MODEL_PATH:=./pretrained/InternVL2-2B}"
: "${META_PATH:=InternVL-Domain-Adaptation-Data/train_meta/internvl_1_2_finetune_remote.json}" "${BATCH_SIZE:=64}"
FLAGS="--num_train_epochs 2 --max_steps 2500 --conv_style internlm2-chat --save_steps 500 --save_total_limit 7"
. "$(dirname "$0")/common.sh"
