#!/usr/bin/env bash
# What fine-tuning of InternVL2.5 shares; its recipes source it.
PROJECT_NAME=internvl_chat_v2_5
FLAGS="--freeze_backbone True $FLAGS"
. "$(dirname "$0")/../../launch.sh"
