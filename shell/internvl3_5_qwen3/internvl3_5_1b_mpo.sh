#!/usr/bin/env bash
# InternVL3.5-1B (InternViT-300M + Qwen3-0.6B): mixed preference optimization of all parts.
TASK=mpo
: "${MODEL_PATH:=OpenGVLab/InternVL3_5-1B-Instruct}"
. "$(dirname "$0")/../internvl3_5.sh"
