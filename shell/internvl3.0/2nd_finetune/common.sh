#!/usr/bin/env bash
# Flags common to the fine-tuning recipes of InternVL3, which source this file.
PROJECT_NAME=internvl_chat_v3
FLAGS="--freeze_backbone True --weight_decay 0.05 --max_dynamic_patch 12 --max_seq_length 16384 $FLAGS"
. "$(dirname "$0")/../../launch.sh"
