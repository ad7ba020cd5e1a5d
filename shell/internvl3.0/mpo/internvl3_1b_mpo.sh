#!/usr/bin/env bash
# InternVL3-1B (InternViT-300M + Qwen2.5-0.5B): mixed preference optimization of all parts.
CLUSTER_GPUS=256
: "${MODEL_PATH:=OpenGVLab/InternVL3-1B-Instruct}" "${OUTPUT_DIR:=work_dirs/internvl_chat_v3_mpo/Internvl3-1B}"
: "${ZERO_CONFIG:=zero_stage1_config.json}" "${BATCH_SIZE:=256}"
FLAGS="--drop_path_rate 0.1 --max_seq_length 12288 --save_strategy no"
. "$(dirname "$0")/common.sh"
