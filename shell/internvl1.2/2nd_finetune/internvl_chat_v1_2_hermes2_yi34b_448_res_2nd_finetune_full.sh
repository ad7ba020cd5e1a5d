#!/usr/bin/env bash
# InternVL-Chat-V1.2-Plus (InternViT-6B + Nous-Hermes-2-Yi-34B): full fine-tuning of the LLM and the projector.
CLUSTER_GPUS=16
: "${MODEL_PATH:=./pretrained/InternVL-Chat-V1-2-Plus}"
FLAGS="--freeze_backbone True --ps_version v1 --max_dynamic_patch 1"
. "$(dirname "$0")/../common.sh"
