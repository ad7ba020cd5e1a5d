#!/usr/bin/env bash
# InternVL3.5-2B (InternViT-300M + Qwen3-1.7B): mixed preference optimization of all parts.
TASK=mpo
: "${MODEL_PATH:=OpenGVLab/InternVL3_5-2B-Instruct}"
. "$(dirname "$0")/../internvl3_5.sh"
