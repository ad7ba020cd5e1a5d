#!/usr/bin/env bash
# Flags common to stage 2 of InternVL2.5 (packed sequences, 512 GPUs); its recipes source this file.
PROJECT_NAME=internvl_chat_v2_5 CLUSTER_GPUS=512
: "${ENTRY:=internvl_chat_pretrain.py}" "${BATCH_SIZE:=512}" "${PER_DEVICE_BATCH_SIZE:=1}"
FLAGS="
    --max_dynamic_patch 12 --max_seq_length 16384 --group_by_length False
    --use_packed_ds True --num_images_expected 48 --max_packed_tokens 16384 --strict_mode False
    --loss_reduction square --loss_reduction_all_gather True
    --dataloader_num_workers 8 --save_steps 100 --save_total_limit 3 $FLAGS
"
. "$(dirname "$0")/../../launch.sh"
