#!/usr/bin/env bash
# Flags common to the recipes of InternVL 1.5, which source this file.
PROJECT_NAME=internvl_chat_v1_5
FLAGS="--max_dynamic_patch 12 --max_seq_length 4096 $FLAGS"
# shellcheck source=shell/launch.sh
. "$(dirname "$0")/../../launch.sh"
