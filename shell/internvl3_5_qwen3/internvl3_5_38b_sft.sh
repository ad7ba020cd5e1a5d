#!/usr/bin/env bash
# InternVL3.5-38B (InternViT-6B + Qwen3-32B): supervised fine-tuning of all parts.
TASK=sft
: "${MODEL_PATH:=OpenGVLab/InternVL3_5-38B-Pretrained}"
FLAGS="--drop_path_rate 0.4 --learning_rate 8e-5"
. "$(dirname "$0")/../internvl3_5.sh"
