#!/usr/bin/env bash
# InternVL3.5-241B-A28B (InternViT-6B + Qwen3-235B-A22B): mixed preference optimization of all parts.
TASK=mpo
: "${MODEL_PATH:=OpenGVLab/InternVL3_5-241B-A28B-Instruct}"
FLAGS="--drop_path_rate 0.4"
. "$(dirname "$0")/../internvl3_5.sh"
