#!/usr/bin/env bash
# InternVL2.5-8B (InternViT-300M + InternLM2.5-7B): mixed preference optimization of all parts.
CLUSTER_GPUS=256
: "${MODEL_PATH:=OpenGVLab/InternVL2_5-8B}" "${OUTPUT_DIR:=work_dirs/internvl_chat_v2_5_mpo/Internvl2_5-8B-MPO}"
: "${ZERO_CONFIG:=zero_stage1_config.json}" "${BATCH_SIZE:=256}"
FLAGS="--drop_path_rate 0.1 --save_strategy no --save_steps 100"
. "$(dirname "$0")/common.sh"
