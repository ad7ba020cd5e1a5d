#!/usr/bin/env bash
# InternVL2.5-26B (InternViT-6B + InternLM2.5-20B): mixed preference optimization of all parts.
CLUSTER_GPUS=256
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-26B}" "${OUTPUT_DIR:=work_dirs/internvl_chat_v2_5_mpo/Internvl2_5-26B-MPO}"
: "${ZERO_CONFIG:=zero_stage3_config_70b.json}" "${BATCH_SIZE:=256}"
FLAGS="--drop_path_rate 0.4 --save_strategy no --save_steps 100"
. "$(dirname "$0")/common.sh"
