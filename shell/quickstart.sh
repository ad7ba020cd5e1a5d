#!/usr/bin/env bash
# Train, evaluate and merge a vision LoRA adapter from end to end, in minutes on two CPU cores, without a download.
# A tiny InternVL learns to read handwritten digits (the base model). Then the digits shift to another domain, and
# shell/internvl2.5/8b_vit_lora.sh adapts the model to it, evaluates it every 50 steps and keeps the best checkpoint.
# Prints a table; writes results.json and report.html.
#
#   bash shell/quickstart.sh [--compare] [--fresh]
#     --compare    also train LoRA in the vision encoder only, and in the LLM only
#     --fresh      start over; otherwise finished stages are skipped
#   OUTPUT_DIR     output folder (work_dirs/quickstart)
#   GPUS           number of ranks: 1 with a single GPU, otherwise 2, also on the CPU

set -euo pipefail
stop() { printf 'quickstart.sh: %s.\n' "$1" >&2 && exit "${2:-1}"; }

COMPARE=0 FRESH=0
for option; do
    case $option in
        --compare) COMPARE=1 ;;
        --fresh) FRESH=1 ;;
        *) stop "unknown option $option: expected --compare or --fresh" 2 ;;
    esac
done

ROOT=$(CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
TOOLS=$ROOT/internvl_chat/tools BASE=$ROOT
[[ -d $TOOLS ]] || TOOLS=$ROOT/tools BASE=$PWD # an installed package
WORK=$(realpath -m -- "${OUTPUT_DIR:-$BASE/work_dirs/quickstart}")
unset OUTPUT_DIR MODEL_PATH META_PATH DRY_RUN # each training stage sets its own
# shellcheck source=shell/setup.sh
source "$ROOT/shell/setup.sh"

if [[ -d $WORK && ! -d $WORK/done && -n $(ls -A "$WORK") ]]; then
    stop "OUTPUT_DIR=$WORK has other files: choose an empty folder"
fi
mkdir -p "$WORK/done" && exec 8>>"$WORK/lock" # locked by this shell and what it starts, until they end
# The last processes of an earlier quickstart may take seconds to end.
! command -v flock >/dev/null || flock -w 30 8 || stop "OUTPUT_DIR=$WORK is in use by another quickstart"
# Results of other versions of these files are not reused.
VERSION=$(cat "$ROOT/shell/quickstart.sh" "$TOOLS"/quickstart/{digits,tiny_model}.py | cksum)
if ((FRESH)) || [[ $(cat "$WORK/done/version" 2>/dev/null) != "$VERSION" ]]; then
    rm -rf "$WORK"/{data,models,results,logs,done}
fi
mkdir -p "$WORK"/{models,logs,done} && printf '%s' "$VERSION" >"$WORK/done/version"
DATA=$WORK/data MODELS=$WORK/models RESULTS=$WORK/results

# -- stages ------------------------------------------------------------------------------------------------------------

# Two ranks also on the CPU: the quickstart shows distributed training.
NUM_GPUS=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
: "${GPUS:=$((NUM_GPUS == 1 ? 1 : 2))}"
# A step has 16 samples, in one packed row per rank. A sample has one tile and at most 56 tokens: 16 have 896.
export GPUS BATCH_SIZE=$GPUS PER_DEVICE_BATCH_SIZE=1 LAUNCHER=pytorch NODES=1
COMMON=(--use_packed_ds True --num_images_expected $((16 / GPUS)) --strict_mode False)
COMMON+=(--max_packed_tokens $((896 / GPUS)))
# The model is tiny: no gradient checkpointing, tiles of 224 pixels.
COMMON+=(--overwrite_output_dir True --grad_checkpoint False --grad_checkpoint_ratio 1 --force_image_size 224)
# Validation digits of both domains; what the base model says about plain ones, to see what the adapters forget.
EVALUATION=(--eval_meta_path "$DATA/validation.json" --eval_base_answers "$DATA/plain_prompts.json")
EVALUATION+=(--eval_strategy steps --eval_steps 50 --eval_on_start True --eval_num_samples 50 --eval_max_new_tokens 12)
EVALUATION+=(--per_device_eval_batch_size 50 --load_best_model_at_end True --metric_for_best_model eval/shifted/loss)
EVALUATION+=(--save_strategy steps --save_steps 50 --save_total_limit 1)
((NUM_GPUS)) || COMMON+=(--dataloader_num_workers 0) # training needs all CPU cores

run_tool() { env -u LAUNCHER TQDM_DISABLE=1 python3 "$TOOLS/$1" "${@:2}"; }

train_base() { # train all parameters, with the same program as every other run
    (
        export MODEL_PATH=$MODELS/init META_PATH=$DATA/plain_train.json OUTPUT_DIR=$MODELS/base
        FLAGS="${COMMON[*]} --save_strategy no --num_train_epochs 2.5 --learning_rate 1e-3 --weight_decay 0.05"
        set --
        # shellcheck source=shell/launch.sh
        source "$ROOT/shell/launch.sh"
    )
}

train_lora() { # arguments: model name, flags; run the unchanged recipe of InternVL2.5-8B on the base model
    MODEL_PATH=$MODELS/base META_PATH=$DATA/shifted_train.json OUTPUT_DIR=$MODELS/$1 \
        bash "$ROOT/shell/internvl2.5/8b_vit_lora.sh" "${COMMON[@]}" "${EVALUATION[@]}" \
        --num_train_epochs 2.5 --learning_rate 3e-3 "${@:2}"
}

STAGES=(data init base base_answers adapted adapted_answers merged merged_answers)
((COMPARE == 0)) || STAGES+=(vision_only vision_only_answers llm_only llm_only_answers)
declare -A TITLES=(
    [data]="draw digits as images and conversations"
    [init]="build a tiny InternVL with random weights"
    [base]="train all parameters on plain digits"
    [adapted]="train LoRA in vision encoder and LLM on shifted digits"
    [merged]="merge LoRA into the base model"
    [vision_only]="train LoRA in the vision encoder only"
    [llm_only]="train LoRA in the LLM only"
)

run_command() { # argument: stage
    case $1 in
        data) run_tool quickstart/digits.py "$DATA" ;;
        init) run_tool quickstart/tiny_model.py "$DATA/plain_train.jsonl" "$MODELS/init" ;;
        base) train_base ;;
        adapted) train_lora adapted ;;
        merged) run_tool merge_lora.py "$MODELS/adapted" "$MODELS/merged" --dtype float32 ;;
        vision_only) train_lora vision_only --use_llm_lora 0 ;;
        llm_only) train_lora llm_only --use_backbone_lora 0 ;;
        *_answers)
            local model=${1%_answers}
            run_tool evaluate.py "$MODELS/$model" "$DATA/heldout.json" --output "$RESULTS/$model" \
                --eval_max_new_tokens 12 --per_device_eval_batch_size 50
            ;;
    esac
}

# -- running stages ----------------------------------------------------------------------------------------------------

print_latest_progress() { # argument: log; print its latest "step 40/400, loss 1.23, left 2:24"
    tail -c 20000 "$1" | tr '\r' '\n' | grep -aE 'step +[0-9]+/[0-9]+ ' | tail -n 1 |
        grep -oE 'step +[0-9]+/[0-9]+|loss +[^ ]+|left +.*' | tr -s ' ' | paste -sd ',' | sed 's/,/, /g'
}

show_progress() { # argument: log; refresh a line every second in a terminal, otherwise print one every half minute
    local seconds progress line interval=30
    [[ ! -t 1 ]] || interval=1
    for ((seconds = 1; ; seconds++)); do
        sleep 1 >/dev/null 2>&1 # inherits no pipe, whose reader would wait for it
        ((seconds % interval == 0)) || continue
        progress=$(print_latest_progress "$1") || progress=
        printf -v line '      %d:%02d  %s' $((seconds / 60)) $((seconds % 60)) "$progress"
        if [[ -t 1 ]]; then printf '\r\033[K%s' "$line"; else printf '%s\n' "$line"; fi
    done
}

run_stage() { # arguments: number, stage; skip it if done; write its seconds to done/STAGE
    local name=$2 label="[$1/${#STAGES[@]}] $2" log=$WORK/logs/$2.log start=$SECONDS status=0 watcher
    if [[ -f $WORK/done/$name ]]; then
        echo "$label: skipped, done before in $(<"$WORK/done/$name") s"
        return
    fi
    echo "$label: ${TITLES[$name]:-answer questions about held-out digits}"
    : >"$log"
    # The stage stays in the foreground: in the background of a script it would ignore Ctrl-C.
    show_progress "$log" &
    watcher=$!
    # shellcheck disable=SC2064 # expanded now: the process id of this watcher
    trap "kill $watcher 2>/dev/null" EXIT
    run_command "$name" >"$log" 2>&1 || status=$?
    kill "$watcher" 2>/dev/null || true
    wait "$watcher" 2>/dev/null || true
    trap - EXIT
    [[ ! -t 1 ]] || printf '\r\033[K'
    if ((status)); then
        grep -v '^ *$' "$log" | tail -n 3 >&2 || true
        stop "stage $name failed with status $status, see $log"
    fi
    echo $((SECONDS - start)) >"$WORK/done/$name"
    echo "      done in $(<"$WORK/done/$name") s"
}

echo "Output folder: $WORK"
for ((i = 0; i < ${#STAGES[@]}; i++)); do
    run_stage $((i + 1)) "${STAGES[i]}"
done
run_tool quickstart/summary.py "$WORK"
run_tool report.py "$MODELS/adapted" --output "$WORK/report.html"
