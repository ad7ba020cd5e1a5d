#!/usr/bin/env bash
# Launch a training run: environment, batch size arithmetic, torchrun or srun, log. The only script with logic. A recipe
# sets variables and FLAGS, in syntax that `sh` can read too, and ends with `. .../launch.sh`. Run by itself, this script
# passes on the flags that it is given, without those of recipes. `internvl train` runs either.
#
#   MODEL_PATH META_PATH OUTPUT_DIR          checkpoint, data sets, output folder
#   BATCH_SIZE PER_DEVICE_BATCH_SIZE         global batch size, maximum micro-batch size; of a packed recipe in rows
#   PACKED_FLAGS PADDED_MICRO_BATCH_SIZE     of a recipe that packs: flags for packed rows, maximum micro-batch size
#                                            without packing (--use_packed_ds False)
#   GPUS NODES GPUS_PER_NODE                 number of ranks; without a GPU they run on the CPU
#   ZERO_CONFIG                              a file of zero_stage_configs/, or none
#   LAUNCHER                                 pytorch (torchrun) or slurm (srun). slurm is the default inside a SLURM
#                                            allocation, with PARTITION, and where srun is installed for a recipe with
#                                            CLUSTER_GPUS, its number of GPUs on a cluster
#   NODE_RANK MASTER_ADDR MASTER_PORT        pytorch with several nodes: start the recipe on each node
#   PARTITION GRES CPUS_PER_TASK SRUN_ARGS   slurm; GRES=none for tasks without a GPU
#   INTERNVL_PYTHON                          the Python to train with; nothing is installed. Without it setup.sh chooses
#   DRY_RUN=1                                print the command and exit
# The user's flags come last and override the recipe's. The exit status is the training's; preemption signals are
# forwarded to it.

# shellcheck disable=SC2015 # `sh recipe.sh` is replaced by bash
[ -n "${BASH_VERSION:-}" ] && set +o posix || exec bash "$0" "$@"
set -euo pipefail
# A closed stdin, stdout or stderr would become the next file that is opened.
[[ -e /dev/fd/0 ]] || exec 0</dev/null
[[ -e /dev/fd/1 ]] || exec 1>/dev/null
[[ -e /dev/fd/2 ]] || exec 2>/dev/null
stop() { printf 'launch.sh: %s.\n' "$*" >&2 && exit 1; }
stop_unless_dry_run() { # for what this machine lacks: a dry run, on any machine, only warns
    if [[ ${DRY_RUN:-0} == 1 ]]; then printf 'launch.sh: warning: %s.\n' "$*" >&2; else stop "$*"; fi
}

ROOT=$(realpath -- "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")/..")
CODE=$ROOT/internvl_chat
[[ -d $CODE ]] || CODE=$ROOT # copied into an upstream checkout: shell/ is inside internvl_chat/
IMPORT_PATH=$CODE${PYTHONPATH:+:$PYTHONPATH}
[[ ! -f $ROOT/__init__.py ]] || CODE=${ROOT%/*} IMPORT_PATH='' # installed: shell/ is inside the package
PYTHON=${INTERNVL_PYTHON:-python3}
RECIPE=$(realpath -- "$0")
[[ $RECIPE == "$ROOT"/shell/* ]] && RECIPE=${RECIPE#"$ROOT"/shell/} || RECIPE=${RECIPE##*/}
RECIPE=${RECIPE%.sh}
[[ ${BASH_SOURCE[0]} == "$0" ]] && RECIPE=internvl IS_RECIPE='' || IS_RECIPE=1
[[ -z ${PROJECT_NAME:-} ]] || RECIPE=$PROJECT_NAME/${RECIPE##*/}
: "${ENTRY:=internvl_chat_finetune.py}" "${META_PATH:=$ROOT/shell/data/internvl_1_2_finetune_custom.json}"
[[ $ENTRY == */* ]] || ENTRY=$CODE/internvl/train/$ENTRY
[[ -f $META_PATH || ! -f $ROOT/$META_PATH ]] || META_PATH=$ROOT/$META_PATH # files of the repository, from any folder
: "${OUTPUT_DIR:=work_dirs/$RECIPE}" "${ZERO_CONFIG:=zero_stage2_config.json}"

get_last_value() { # arguments: flag, words; print the flag's last value among the words, which the parser uses
    local flag=${1//-/_} value='' name
    while shift && (($#)); do
        name=${1%%=*}
        [[ ${name//-/_} == "$flag" ]] || continue # --output-dir is --output_dir
        if [[ $1 == *=* ]]; then value=${1#*=}; else value=${2:-}; fi
    done
    printf '%s' "$value"
}

if [[ -n ${PACKED_FLAGS:-} ]]; then
    USE_PACKED_DS=$(get_last_value --use_packed_ds "$@")
    case ${USE_PACKED_DS,,} in
        false | no | f | n | 0) : "${PER_DEVICE_BATCH_SIZE:=$PADDED_MICRO_BATCH_SIZE}" ;;
        *) # 32 rows of 8192 tokens hold about as many samples as a padded step: 128 of 2,000 tokens
            FLAGS+=" --use_packed_ds True $PACKED_FLAGS"
            : "${BATCH_SIZE:=32}" "${PER_DEVICE_BATCH_SIZE:=1}"
            ;;
    esac
fi
: "${BATCH_SIZE:=128}" "${PER_DEVICE_BATCH_SIZE:=4}"

count_local_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true # -1 hides them all
    else
        { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}

require_positive_integers() { # names of variables, each of which may be unset
    local name
    for name; do
        [[ -z ${!name:-} || ${!name} =~ ^[1-9][0-9]*$ ]] || stop "$name=${!name} is invalid: expected an integer >= 1"
    done
}

# This shell runs outside of SLURM, in an allocation (sbatch, salloc), or as one task of a step (srun).
SLURM_PLACE=outside
[[ -n ${SLURM_JOB_ID:-} ]] && SLURM_PLACE=allocation
# Step 4294967290 is the shell that salloc opens on the first node.
[[ -n ${SLURM_STEP_ID:-} && $SLURM_STEP_ID != 4294967290 ]] && SLURM_PLACE=task
STEP_TASKS=${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-1}}
if [[ -z ${LAUNCHER:-} ]]; then
    LAUNCHER=slurm
    case $SLURM_PLACE in
        outside) [[ -n ${PARTITION:-} || (-n ${CLUSTER_GPUS:-} && -n $(command -v srun)) ]] || LAUNCHER=pytorch ;;
        task) ((STEP_TASKS > 1)) || LAUNCHER=pytorch ;; # `srun --pty bash`: like a machine without SLURM
    esac
fi
require_positive_integers GPUS NODES GPUS_PER_NODE BATCH_SIZE PER_DEVICE_BATCH_SIZE CPUS_PER_TASK MASTER_PORT
((${MASTER_PORT:-1} <= 65535)) || stop "MASTER_PORT=$MASTER_PORT is invalid: expected a port from 1 to 65535"

LOCAL_GPUS=$(count_local_gpus)
case $LAUNCHER-$SLURM_PLACE in
    pytorch-*) NODES=${NODES:-} PER_NODE=${GPUS:-$((LOCAL_GPUS > 0 ? LOCAL_GPUS : 1))} ;;
    slurm-task) GPUS=${GPUS:-$STEP_TASKS} NODES=${NODES:-${SLURM_STEP_NUM_NODES:-1}} PER_NODE=1 ;;
    slurm-allocation)
        NODES=${NODES:-${SLURM_JOB_NUM_NODES:-1}} PER_NODE=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-8}}
        ;;
    slurm-*) NODES=${NODES:-} PER_NODE=8 && [[ -n $NODES ]] || : "${GPUS:=${CLUSTER_GPUS:-}}" ;;
    *) stop "LAUNCHER=$LAUNCHER is not supported: expected pytorch or slurm" ;;
esac
if [[ -n ${GPUS:-} ]]; then
    [[ -n $NODES ]] && PER_NODE=$((GPUS / NODES))
    : "${GPUS_PER_NODE:=$((GPUS < PER_NODE ? GPUS : PER_NODE))}"
    : "${NODES:=$((GPUS / (GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1)))}"
else
    : "${NODES:=1}" "${GPUS_PER_NODE:=$PER_NODE}"
    GPUS=$((NODES * GPUS_PER_NODE))
fi
((GPUS == NODES * GPUS_PER_NODE)) ||
    stop "GPUS=$GPUS is invalid: expected NODES=$NODES x GPUS_PER_NODE=$GPUS_PER_NODE = $((NODES * GPUS_PER_NODE))"
if [[ $LAUNCHER == pytorch ]] && ((LOCAL_GPUS > 0 && GPUS_PER_NODE > LOCAL_GPUS)); then
    stop_unless_dry_run "GPUS=$GPUS needs $GPUS_PER_NODE on this machine, which has $LOCAL_GPUS"
fi
if [[ $LAUNCHER-$SLURM_PLACE == slurm-task ]] && ((GPUS != STEP_TASKS)); then
    stop "GPUS=$GPUS is invalid: this step of SLURM has $STEP_TASKS tasks"
fi

if [[ -n $IS_RECIPE ]]; then
    [[ " $*" != *" --config"[=\ ]* ]] || stop "--config replaces a recipe: internvl train --config FILE"
    if ((GPUS <= BATCH_SIZE && BATCH_SIZE < GPUS * PER_DEVICE_BATCH_SIZE)); then
        PER_DEVICE_BATCH_SIZE=$((BATCH_SIZE / GPUS))
        echo "launch.sh: micro-batch size reduced to $PER_DEVICE_BATCH_SIZE: BATCH_SIZE=$BATCH_SIZE / GPUS=$GPUS." >&2
    fi
    UNIT=$((PER_DEVICE_BATCH_SIZE * GPUS))
    GRADIENT_ACC=$((BATCH_SIZE / UNIT))
    if ((GRADIENT_ACC * UNIT != BATCH_SIZE)); then
        NEAREST=$((UNIT * (GRADIENT_ACC + 1)))
        ((GRADIENT_ACC == 0)) || NEAREST="$((UNIT * GRADIENT_ACC)) and $NEAREST"
        stop "BATCH_SIZE=$BATCH_SIZE is not a multiple of PER_DEVICE_BATCH_SIZE=$PER_DEVICE_BATCH_SIZE x GPUS=$GPUS" \
            "= $UNIT; nearest valid: $NEAREST"
    fi

    ARGS=( # flags common to upstream's InternVL2.5 recipes; recipes of other models override them in FLAGS
        --conv_style internvl2_5 --force_image_size 448 --down_sample_ratio 0.5 --ps_version v2
        --dynamic_image_size True --use_thumbnail True --max_dynamic_patch 6 --max_seq_length 8192
        --group_by_length True --do_train True --num_train_epochs 1 --bf16 True --grad_checkpoint True
        --dataloader_num_workers 4 --lr_scheduler_type cosine --warmup_ratio 0.03 --evaluation_strategy no
        --save_strategy steps --save_steps 200 --save_total_limit 1 --logging_steps 1 --report_to tensorboard
        --meta_path "$META_PATH" --output_dir "$OUTPUT_DIR"
        --per_device_train_batch_size "$PER_DEVICE_BATCH_SIZE" --gradient_accumulation_steps "$GRADIENT_ACC"
    )
    [[ -z ${MODEL_PATH:-} ]] || ARGS+=(--model_name_or_path "$MODEL_PATH")
    [[ $ZERO_CONFIG == none ]] || ARGS+=(--deepspeed "$ZERO_CONFIG")
    # shellcheck disable=SC2206 # FLAGS is split into words
    ARGS+=(${FLAGS:-} "$@")
    MODEL_NAME=MODEL_PATH= META_NAME=META_PATH= OUTPUT_NAME=OUTPUT_DIR= # for messages
else
    ARGS=("$@")
    MODEL_NAME='--model_name_or_path ' META_NAME='--meta_path ' OUTPUT_NAME='--output_dir '
fi

MODEL=$(get_last_value --model_name_or_path "${ARGS[@]}")
META=$(get_last_value --meta_path "${ARGS[@]}")
OUTPUT=$(get_last_value --output_dir "${ARGS[@]}")
[[ -n $META && -n $OUTPUT ]] || stop "--meta_path and --output_dir are required: data sets, output folder"
# ORG/NAME is downloaded from the Hugging Face hub, unless ORG is a folder here: then it is a wrong path.
if [[ -n $MODEL && ! -d $MODEL && (! $MODEL =~ ^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$ || -d ${MODEL%%/*}) ]]; then
    stop_unless_dry_run "$MODEL_NAME$MODEL is not a folder and not a model ORG/NAME of the Hugging Face hub"
fi
[[ -f $META ]] || stop_unless_dry_run "$META_NAME$META is not a file; copy $ROOT/shell/data/example.json"
[[ -f $ENTRY ]] || stop_unless_dry_run "ENTRY=$ENTRY is not a file"

find_free_port() { # below the range from which systems take ports for outgoing connections
    local port
    while port=$((20000 + RANDOM % 10000)); do
        (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break # nobody listens there
    done
    echo "$port"
}

# Under SLURM the tasks choose a port from the ids of job and step (launchers.py), unless MASTER_PORT is set.
case $LAUNCHER-$SLURM_PLACE in
    pytorch-*)
        if ((NODES > 1)) && [[ -z ${MASTER_ADDR:-} || -z ${NODE_RANK:-} ]]; then
            stop "NODES=$NODES with LAUNCHER=pytorch requires MASTER_ADDR and NODE_RANK: start the recipe on every node"
        fi
        [[ ${NODE_RANK:=0} =~ ^(0|[1-9][0-9]*)$ ]] && ((NODE_RANK < NODES)) ||
            stop "NODE_RANK=$NODE_RANK is invalid: expected an integer from 0 to $((NODES - 1)), because NODES=$NODES"
        ((NODES == 1)) || : "${MASTER_PORT:=34229}" # the same on every node
        : "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=$(find_free_port)}"
        CPUS_PER_TASK=${CPUS_PER_TASK:-$(($(env -u OMP_NUM_THREADS nproc) / GPUS_PER_NODE))}
        START=("$PYTHON" "$ROOT/shell/torchrun.py" --nnodes="$NODES" --node_rank="$NODE_RANK"
            --nproc_per_node="$GPUS_PER_NODE" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT")
        ;;
    slurm-task)
        CPUS_PER_TASK=${CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}
        START=("$PYTHON" -u)
        ;;
    slurm-*)
        command -v srun >/dev/null || stop_unless_dry_run "LAUNCHER=slurm requires srun, which is not on PATH"
        START=(srun --job-name="${RECIPE//\//-}" --nodes="$NODES" --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE")
        if [[ $SLURM_PLACE == outside ]]; then
            : "${GRES:=gpu:$GPUS_PER_NODE}" "${CPUS_PER_TASK:=10}"
            [[ -z ${PARTITION:-} ]] || START+=(-p "$PARTITION")
        else # a step inherits the GPUs and the partition of its allocation
            : "${GRES:=none}"
            SHARE=$((${SLURM_CPUS_ON_NODE:-1} / GPUS_PER_NODE))
            : "${CPUS_PER_TASK:=${SLURM_CPUS_PER_TASK:-$((SHARE > 0 ? SHARE : 1))}}"
        fi
        [[ $GRES == none ]] || START+=(--gres="$GRES")
        # shellcheck disable=SC2206 # SRUN_ARGS is split into words
        START+=(--cpus-per-task="$CPUS_PER_TASK" --kill-on-bad-exit=1 ${SRUN_ARGS:-} "$PYTHON" -u)
        ;;
esac

# Packed rows differ in numbers of tiles: expandable segments avoid fragmented GPU memory. Before torch 2.9 only the
# second name is known; torch 2.9 warns if it is set without the first.
ALLOC_CONF=${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}
COMMAND=(
    env PYTORCH_ALLOC_CONF="$ALLOC_CONF" PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF-$ALLOC_CONF}"
    LAUNCHER="$LAUNCHER" ${MASTER_PORT:+MASTER_PORT="$MASTER_PORT"} TF_CPP_MIN_LOG_LEVEL=3
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CPUS_PER_TASK > 0 ? CPUS_PER_TASK : 1))}"
    ${IMPORT_PATH:+PYTHONPATH="$IMPORT_PATH"}
    "${START[@]}" "$ENTRY" "${ARGS[@]}"
)
if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${COMMAND[@]}" && echo
    exit
fi

# shellcheck source=shell/setup.sh
[[ -n ${INTERNVL_PYTHON:-} ]] || source "$ROOT/shell/setup.sh"
[[ -z $IMPORT_PATH ]] || export PYTHONPATH=$IMPORT_PATH
[[ $LAUNCHER-$SLURM_PLACE == slurm-task && $SLURM_PROCID != 0 ]] && exec "${COMMAND[@]}" # task 0 alone writes the log
[[ ${NODE_RANK:-0} != 0 ]] || "$PYTHON" -m internvl.runtime.output_lock "${ARGS[@]}"
ERROR=$(mkdir -p "$OUTPUT" 2>&1) || stop "cannot create $OUTPUT_NAME$OUTPUT: ${ERROR##*: }"
[[ ! -e $OUTPUT/training_log.txt || -f $OUTPUT/training_log.txt ]] || stop "$OUTPUT/training_log.txt is not a regular file"

# Whatever signals come, tee and this shell stay until the training has exited and the log is complete. The log is
# written even if the reader of stdout leaves (PIPE). Signals that reach only this shell are forwarded to the training.
# Ctrl-C in a terminal reaches the training directly, but not srun, which would kill its tasks at SIGINT, SIGTERM and
# SIGHUP: it gets SIGUSR1. If this shell is killed, the training gets the same signal, and saves a checkpoint.
exec > >(trap '' HUP INT TERM USR1 PIPE && exec tee -a "$OUTPUT/training_log.txt") 2>&1
LOG=$! ON_TERM=TERM GUARD=(env)
[[ ${START[0]} != srun ]] || ON_TERM=USR1 GUARD=(setsid)
! setpriv --pdeathsig="$ON_TERM" true 2>/dev/null || GUARD+=(setpriv --pdeathsig="$ON_TERM")
"${GUARD[@]}" "${COMMAND[@]}" <&0 &
TRAINING=$!
# shellcheck disable=SC2317,SC2329 # the traps call it
forward_signal() { HAS_TRAPPED=1 && { kill -"$1" "$TRAINING" 2>/dev/null || true; }; }
trap HAS_TRAPPED=1 INT && trap 'forward_signal USR1' USR1 && trap 'forward_signal $ON_TERM' TERM HUP
[[ $ON_TERM == TERM ]] || trap 'forward_signal USR1' INT
# A trapped signal interrupts `wait`: wait again.
while HAS_TRAPPED='' STATUS=0 && { wait "$TRAINING" || STATUS=$?; } && [[ -n $HAS_TRAPPED ]]; do :; done
exec >&- 2>&-
wait "$LOG" || true
exit "$STATUS"
