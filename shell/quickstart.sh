#!/usr/bin/env bash
# The main job end to end, on whatever machine this is, in some minutes on two CPU cores and without any download:
# a tiny InternVL is trained to read handwritten digits, the digits change looks, and shell/internvl2.5/8b_vit_lora.sh
# adapts the model to them. Prints a table, writes results.json and report.html.
#
#   bash shell/quickstart.sh [--compare] [--fresh]
#     --compare    also with adapters in the vision encoder alone, and in the language model alone
#     --fresh      start over; otherwise stages that are done are not repeated
#   OUTPUT_DIR     where to (work_dirs/quickstart)
#   GPUS           processes: 2, on the CPU too; 1 where there is one GPU

set -euo pipefail
say() { printf 'quickstart.sh: %s\n' "$*"; }
stop() { say "$1." >&2 && exit "${2:-1}"; }

COMPARE=0 FRESH=0
for option; do
    case $option in
        --compare) COMPARE=1 ;;
        --fresh) FRESH=1 ;;
        *) stop "unknown option $option; known are --compare and --fresh" 2 ;;
    esac
done

ROOT=$(CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
TOOLS=$ROOT/internvl_chat/tools
WORK=$(realpath -m -- "${OUTPUT_DIR:-$ROOT/work_dirs/quickstart}")
unset OUTPUT_DIR MODEL_PATH META_PATH DRY_RUN # each stage has its own
# shellcheck source=shell/setup.sh
source "$ROOT/shell/setup.sh"

if [[ -d $WORK && ! -d $WORK/done && -n $(ls -A "$WORK") ]]; then
    stop "OUTPUT_DIR=$WORK holds something else; choose an empty folder"
fi
# What was made by other versions of these files is not reused.
VERSION=$(cat "$ROOT/shell/quickstart.sh" "$TOOLS"/quickstart/{digits,tiny_model,evaluate}.py | cksum)
if ((FRESH)) || [[ $(cat "$WORK/done/version" 2>/dev/null) != "$VERSION" ]]; then
    rm -rf "$WORK"/{data,models,logs,done}
fi
mkdir -p "$WORK"/{models,logs,done} && printf '%s' "$VERSION" >"$WORK/done/version"
DATA=$WORK/data MODELS=$WORK/models

stage() { # name, command...: done once; done/NAME keeps the seconds it took
    local name=$1 log=$WORK/logs/$1.log start=$SECONDS
    shift
    [[ -f $WORK/done/$name ]] && say "$name: done before, in $(<"$WORK/done/$name") s" && return
    say "$name ..."
    if ! "$@" >"$log" 2>&1; then
        grep -v '^ *$' "$log" | tail -n 3 >&2 || true
        stop "stage $name failed; its log is $log"
    fi
    echo $((SECONDS - start)) >"$WORK/done/$name"
    say "$name: $(<"$WORK/done/$name") s"
}

tool() { python3 "$TOOLS/$1" "${@:2}"; }

# Two processes on the CPU, so that what runs here is distributed training.
HERE=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
: "${GPUS:=$((HERE == 1 ? 1 : 2))}"
export GPUS BATCH_SIZE=16 PER_DEVICE_BATCH_SIZE=$((16 / GPUS)) LAUNCHER=pytorch NODES=1
# Small pictures of one size and a small model need neither length groups nor recomputed activations, nor large tiles;
# nothing is resumed.
COMMON=(--overwrite_output_dir True --save_strategy no --group_by_length False --grad_checkpoint False)
COMMON+=(--force_image_size 224)
((HERE)) || COMMON+=(--dataloader_num_workers 0) # the cores are busy with training

train_base() { # everything trains, by the same entry as any other run
    (
        export MODEL_PATH=$MODELS/init META_PATH=$DATA/plain_train.json OUTPUT_DIR=$MODELS/base
        FLAGS="${COMMON[*]} --num_train_epochs 2.5 --learning_rate 1e-3 --weight_decay 0.05"
        set --
        # shellcheck source=shell/launch.sh
        source "$ROOT/shell/launch.sh"
    )
}

adapt() { # name of the outcome, flags...: the recipe for InternVL2.5-8B as it is, with other weights and data
    MODEL_PATH=$MODELS/base META_PATH=$DATA/shifted_train.json OUTPUT_DIR=$MODELS/$1 \
        bash "$ROOT/shell/internvl2.5/8b_vit_lora.sh" "${COMMON[@]}" --num_train_epochs 2.5 --learning_rate 3e-3 "${@:2}"
}

evaluate() { # name of the model, looks...
    tool quickstart/evaluate.py "$MODELS/$1" "$WORK/answers_$1.json" "${@:2}"
}

HELD_OUT=("$DATA/plain_heldout.jsonl" "$DATA/shifted_heldout.jsonl")
stage data tool quickstart/digits.py "$DATA"
stage init tool quickstart/tiny_model.py "$DATA/plain_train.jsonl" "$MODELS/init"
stage base train_base
stage base_answers evaluate base "${HELD_OUT[@]}"
stage adapted adapt adapted
stage adapted_answers evaluate adapted "${HELD_OUT[@]}"
stage merged tool merge_lora.py "$MODELS/adapted" "$MODELS/merged" --dtype float32
stage merged_answers evaluate merged "${HELD_OUT[@]}"
if ((COMPARE)); then
    stage vision_alone adapt vision_alone --use_llm_lora 0
    stage vision_alone_answers evaluate vision_alone "${HELD_OUT[@]}"
    stage language_alone adapt language_alone --use_backbone_lora 0
    stage language_alone_answers evaluate language_alone "${HELD_OUT[@]}"
fi
tool quickstart/report.py "$WORK"
