#!/usr/bin/env bash
# InternVL3.5-1B (InternViT-300M + Qwen3-0.6B): supervised fine-tuning of all parts.
TASK=sft
: "${MODEL_PATH:=OpenGVLab/InternVL3_5-1B-Pretrained}"
FLAGS="--learning_rate 8e-5"
. "$(dirname "$0")/../internvl3_5.sh"
