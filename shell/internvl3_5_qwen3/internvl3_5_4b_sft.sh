#!/usr/bin/env bash
# InternVL3.5-4B (InternViT-300M + Qwen3-4B): supervised fine-tuning of all parts.
TASK=sft
: "${MODEL_PATH:=OpenGVLab/InternVL3_5-4B-Pretrained}"
FLAGS="--learning_rate 8e-5"
. "$(dirname "$0")/../internvl3_5.sh"
