#!/usr/bin/env bash
# What fine-tuning of InternVL2 shares; its recipes source it.
PROJECT_NAME=internvl_chat_v2_0
FLAGS="--freeze_backbone True --max_seq_length 4096 $FLAGS"
. "$(dirname "$0")/../../launch.sh"
