#!/usr/bin/env bash
# Flags common to the fine-tuning recipes of InternVL2.5, which source this file.
PROJECT_NAME=internvl_chat_v2_5
FLAGS="--freeze_backbone True $FLAGS"
. "$(dirname "$0")/../../launch.sh"
