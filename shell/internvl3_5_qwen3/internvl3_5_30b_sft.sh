#!/usr/bin/env bash
# InternVL3.5-30B-A3B (InternViT-300M + Qwen3-30B-A3B): supervised fine-tuning of all parts.
TASK=sft
: "${MODEL_PATH:=OpenGVLab/InternVL3_5-30B-A3B-Pretrained}"
FLAGS="--drop_path_rate 0.1 --learning_rate 8e-5"
. "$(dirname "$0")/../internvl3_5.sh"
