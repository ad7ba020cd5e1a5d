#!/usr/bin/env bash
# InternVL3.5-38B (InternViT-6B + Qwen3-32B): mixed preference optimization of all parts.
TASK=mpo
: "${MODEL_PATH:=OpenGVLab/InternVL3_5-38B-Instruct}"
FLAGS="--drop_path_rate 0.4"
. "$(dirname "$0")/../internvl3_5.sh"
