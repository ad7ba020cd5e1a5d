#!/usr/bin/env bash
# InternVL3.5-30B-A3B (InternViT-300M + Qwen3-30B-A3B): mixed preference optimization of all parts.
TASK=mpo
: "${MODEL_PATH:=OpenGVLab/InternVL3_5-30B-A3B-Instruct}"
FLAGS="--drop_path_rate 0.1"
. "$(dirname "$0")/../internvl3_5.sh"
