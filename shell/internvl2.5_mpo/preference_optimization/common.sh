#!/usr/bin/env bash
# Flags common to the preference optimization recipes of InternVL2.5, which source this file.
PROJECT_NAME=internvl_chat_v2_5_mpo
: "${ENTRY:=internvl_chat_mpo.py}" "${META_PATH:=MMPR-v1.1/meta.json}" "${PER_DEVICE_BATCH_SIZE:=1}"
FLAGS="
    --learning_rate 1e-6 --weight_decay 0.05 --max_dynamic_patch 12 --group_by_length False
    --loss_type sigmoid,bco_pair --sigmoid_loss_weight 0.8 --bco_pair_loss_weight 0.2 --rpo_alpha 1
    --use_liger True --dataloader_num_workers 8 --save_total_limit 100 $FLAGS
"
. "$(dirname "$0")/../../launch.sh"
