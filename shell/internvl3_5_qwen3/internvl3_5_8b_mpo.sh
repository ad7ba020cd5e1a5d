#!/usr/bin/env bash
# InternVL3.5-8B (InternViT-300M + Qwen3-8B): mixed preference optimization of all parts.
TASK=mpo
: "${MODEL_PATH:=OpenGVLab/InternVL3_5-8B-Instruct}"
FLAGS="--drop_path_rate 0.1"
. "$(dirname "$0")/../internvl3_5.sh"
