#!/usr/bin/env bash
# InternVL3.5-4B (InternViT-300M + Qwen3-4B): mixed preference optimization of all parts.
TASK=mpo
: "${MODEL_PATH:=OpenGVLab/InternVL3_5-4B-Instruct}"
. "$(dirname "$0")/../internvl3_5.sh"
