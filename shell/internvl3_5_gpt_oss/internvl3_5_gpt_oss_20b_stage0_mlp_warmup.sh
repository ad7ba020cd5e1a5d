#!/usr/bin/env bash
# InternVL3.5-GPT-OSS-20B (InternViT-300M + GPT-OSS-20B): stage 0, warmup of the projector.
TASK=sft PROJECT_NAME=internvl3_5_gpt_oss_20b_pretrain
: "${BATCH_SIZE:=256}"
FLAGS="
    --vision_path OpenGVLab/InternViT-300M-448px-V2_5 --llm_path openai/gpt-oss-20b
    --freeze_backbone True --freeze_llm True --drop_path_rate 0.1
    --learning_rate 1e-3 --warmup_ratio 0.01 --max_steps 5000 --conv_style internvl3_5_gpt_oss --max_seq_length 16384
    --use_custom_flash_attn True --seed 22110 --save_total_limit 20
"
. "$(dirname "$0")/../internvl3_5.sh"
