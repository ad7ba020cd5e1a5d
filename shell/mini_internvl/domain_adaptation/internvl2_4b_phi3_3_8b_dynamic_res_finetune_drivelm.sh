#!/usr/bin/env bash
# InternVL2-4B (InternViT-300M + Phi-3-mini): domain adaptation of all parts to DriveLM.
: "${MODEL_PATH:=./pretrained/InternVL2-4B}"
: "${META_PATH:=InternVL-Domain-Adaptation-Data/train_meta/internvl_1_2_finetune_drivelm.json}" "${BATCH_SIZE:=8}"
FLAGS="--max_steps 15100 --conv_style phi3-chat"
. "$(dirname "$0")/common.sh"
