#!/usr/bin/env bash
# InternVL3.5-241B-A28B (InternViT-6B + Qwen3-235B-A22B): supervised fine-tuning of all parts.
TASK=sft
: "${MODEL_PATH:=OpenGVLab/InternVL3_5-241B-A28B-Pretrained}"
FLAGS="--drop_path_rate 0.4 --learning_rate 2e-5"
. "$(dirname "$0")/../internvl3_5.sh"
