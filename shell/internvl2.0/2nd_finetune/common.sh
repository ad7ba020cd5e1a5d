#!/usr/bin/env bash
# Flags common to the fine-tuning recipes of InternVL2, which source this file.
PROJECT_NAME=internvl_chat_v2_0
FLAGS="--freeze_backbone True --max_seq_length 4096 $FLAGS"
. "$(dirname "$0")/../../launch.sh"
