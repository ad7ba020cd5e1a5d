#!/usr/bin/env bash
# Flags common to the recipes of InternVL 1.2, which source this file.
PROJECT_NAME=internvl_chat_v1_2
: "${ZERO_CONFIG:=zero_stage3_config_34b.json}"
FLAGS="
    --learning_rate 1e-5 --weight_decay 0.05
    --conv_style Hermes-2 --dynamic_image_size False --use_thumbnail False --max_seq_length 2048 $FLAGS
"
# shellcheck source=shell/launch.sh
. "$(dirname "$0")/../../launch.sh"
