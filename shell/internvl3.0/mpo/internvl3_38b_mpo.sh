#!/usr/bin/env bash
# InternVL3-38B (InternViT-6B + Qwen2.5-32B): mixed preference optimization of all parts.
CLUSTER_GPUS=512
: "${MODEL_PATH:=OpenGVLab/InternVL3-38B-Instruct}" "${OUTPUT_DIR:=work_dirs/internvl_chat_v3_mpo/Internvl3-38B}"
: "${ZERO_CONFIG:=zero_stage3_config_100b_1e7_offload.json}" "${BATCH_SIZE:=512}"
FLAGS="--drop_path_rate 0.4"
. "$(dirname "$0")/common.sh"
