#!/usr/bin/env bash
# InternVL2-2B (InternViT-300M + InternLM2-1.8B): domain adaptation of all parts to DriveLM.
: "${MODEL_PATH:=./pretrained/InternVL2-2B}"
: "${META_PATH:=InternVL-Domain-Adaptation-Data/train_meta/internvl_1_2_finetune_drivelm.json}" "${BATCH_SIZE:=8}"
FLAGS="--num_train_epochs 2 --max_steps 15100 --conv_style internlm2-chat"
. "$(dirname "$0")/common.sh"
