#!/usr/bin/env bash
# Flags common to domain adaptation of Mini-InternVL (packed sequences, 8 GPUs); its recipes source this file.
PROJECT_NAME=domain_adaptation CLUSTER_GPUS=8
: "${ZERO_CONFIG:=zero_stage1_config.json}" "${PER_DEVICE_BATCH_SIZE:=1}"
FLAGS="
    --drop_path_rate 0.1 --learning_rate 1e-5 --weight_decay 0.01 --max_dynamic_patch 12 --group_by_length False
    --use_packed_ds True --num_images_expected 48 --max_packed_tokens 16384 --strict_mode False
    --loss_reduction square --loss_reduction_all_gather True
    --dataloader_num_workers 8 --save_steps 700 --save_total_limit 3 $FLAGS
"
. "$(dirname "$0")/../../launch.sh"
