#!/usr/bin/env bash
# InternVL2-1B (InternViT-300M + Qwen2-0.5B): domain adaptation of all parts to remote sensing.
: "${MODEL_PATH:=./pretrained/InternVL2-1B}"
: "${META_PATH:=InternVL-Domain-Adaptation-Data/train_meta/internvl_1_2_finetune_remote.json}" "${BATCH_SIZE:=64}"
FLAGS="--num_train_epochs 2 --max_steps 2500 --conv_style Hermes-2 --save_steps 500"
. "$(dirname "$0")/common.sh"
