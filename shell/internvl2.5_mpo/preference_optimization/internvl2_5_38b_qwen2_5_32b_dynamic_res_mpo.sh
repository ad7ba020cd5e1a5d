#!/usr/bin/env bash
# InternVL2.5-38B (InternViT-6B + Qwen2.5-32B): mixed preference optimization of all parts.
CLUSTER_GPUS=512
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-38B}" "${OUTPUT_DIR:=work_dirs/internvl_chat_v2_5_mpo/Internvl2_5-38B-MPO}"
: "${ZERO_CONFIG:=zero_stage3_config_100b.json}" "${BATCH_SIZE:=512}"
FLAGS="--drop_path_rate 0.4"
. "$(dirname "$0")/common.sh"
