#!/usr/bin/env bash
# InternVL2.5-26B (InternViT-6B + InternLM2.5-20B): stage 1.5, training of the vision encoder and the projector.
: "${MODEL_PATH:=work_dirs/internvl_chat_v2_5/internvl2_5_26b_internlm2_5_20b_dynamic_res_stage1}"
: "${ZERO_CONFIG:=zero_stage3_config.json}"
FLAGS="--drop_path_rate 0.4"
. "$(dirname "$0")/common.sh"
