#!/usr/bin/env bash
# Flags common to the recipes of InternVL3.5, which source this file with TASK=sft (packed sequences) or TASK=mpo (pairs
# of answers). As in upstream's scripts of 3.5, WORLD_SIZE and RANK are the number of nodes and the rank of this one.
: "${NODES:=${WORLD_SIZE:-}}" "${NODE_RANK:=${RANK:-}}" "${GPUS_PER_NODE:=${NPROC_PER_NODE:-}}"
: "${PROJECT_NAME:=$(basename "$0" .sh)}" "${ZERO_CONFIG:=zero_stage3_config.json}" "${PER_DEVICE_BATCH_SIZE:=1}"
case $TASK in
    sft)
        : "${META_PATH:=shell/data/debug_sft.json}" "${BATCH_SIZE:=512}"
        FLAGS="
            --max_steps 8000 --max_seq_length 32768 --save_steps 500 --save_total_limit 100
            --use_packed_ds True --num_images_expected 96 --max_packed_tokens 32768 --strict_mode False
            --replacement True --loss_reduction square --split_annotations True $FLAGS
        "
        ;;
    mpo) # upstream has these losses and weights hard-coded in its code of InternVL3.5
        : "${ENTRY:=internvl_chat_mpo.py}" "${META_PATH:=shell/data/debug_mpo.json}" "${BATCH_SIZE:=256}"
        FLAGS="
            --learning_rate 2e-7 --max_seq_length 16384 --save_total_limit 50 --loss_type sigmoid,bco_pair
            --sigmoid_loss_weight 0.8 --bco_pair_loss_weight 0.2 --rpo_alpha 1 $FLAGS
        "
        ;;
esac
FLAGS="
    --weight_decay 0.05 --max_dynamic_patch 12 --group_by_length False --gradient_checkpointing True
    --dataloader_num_workers 16 $FLAGS
"
# shellcheck source=shell/launch.sh
. "$(dirname "$0")/../launch.sh"
