#!/usr/bin/env bash
# Starts a training: environment, arithmetic, torchrun or srun, log. The only script with logic; a recipe sets what
# differs (variables, flags in FLAGS), in words that `sh` reads too, and ends with `. .../launch.sh`.
#
#   MODEL_PATH META_PATH OUTPUT_DIR          what to train, on what, where to
#   BATCH_SIZE PER_DEVICE_BATCH_SIZE         samples per step, of all processes and (at most) of one micro-batch
#   GPUS NODES GPUS_PER_NODE                 processes; without a GPU they run on the CPU
#   ZERO_CONFIG                              a file of zero_stage_configs/, or none
#   LAUNCHER                                 pytorch, or slurm: the default inside a SLURM allocation, with PARTITION,
#                                            and where srun is for a recipe that names its GPUs there, CLUSTER_GPUS
#   NODE_RANK MASTER_ADDR MASTER_PORT        pytorch on several nodes: start it on each
#   PARTITION GRES CPUS_PER_TASK SRUN_ARGS   slurm; GRES=none for tasks without a GPU
#   DRY_RUN=1                                print the command and stop
# The user's flags come last and win. The exit status is the training's; signals to leave reach it.

# shellcheck disable=SC2015 # `sh recipe.sh` goes on with bash
[ -n "${BASH_VERSION:-}" ] && set +o posix || exec bash "$0" "$@"
set -euo pipefail
stop() { printf 'launch.sh: %s.\n' "$*" >&2 && exit 1; }
# What depends on this machine is only a warning in a dry run: recipes can be inspected anywhere.
machine_lacks() { if [[ ${DRY_RUN:-0} == 1 ]]; then printf 'launch.sh: warning: %s.\n' "$*" >&2; else stop "$*"; fi; }

ROOT=$(realpath -- "$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")/..")
CODE=$ROOT/internvl_chat
[[ -d $CODE ]] || CODE=$ROOT # laid over an upstream checkout, shell/ stands inside internvl_chat/
RECIPE=$(realpath -- "$0")
[[ $RECIPE == "$ROOT"/shell/* ]] && RECIPE=${RECIPE#"$ROOT"/shell/} || RECIPE=${RECIPE##*/}
RECIPE=${RECIPE%.sh}
[[ -z ${PROJECT_NAME:-} ]] || RECIPE=$PROJECT_NAME/${RECIPE##*/}
: "${ENTRY:=internvl_chat_finetune.py}" "${META_PATH:=$ROOT/shell/data/internvl_1_2_finetune_custom.json}"
[[ $ENTRY == */* ]] || ENTRY=$CODE/internvl/train/$ENTRY
[[ -f $META_PATH || ! -f $ROOT/$META_PATH ]] || META_PATH=$ROOT/$META_PATH # those of this repository, from anywhere
: "${OUTPUT_DIR:=work_dirs/$RECIPE}" "${ZERO_CONFIG:=zero_stage2_config.json}"
: "${BATCH_SIZE:=128}" "${PER_DEVICE_BATCH_SIZE:=4}"

gpus_here() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true # -1 hides them all
    else
        { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
    fi
}

is_count() { # names of variables that must hold a positive whole number where they are set
    local name
    for name; do
        [[ -z ${!name:-} || ${!name} =~ ^[1-9][0-9]*$ ]] || stop "$name=${!name} is not a positive whole number"
    done
}

# Where this shell stands in SLURM: nowhere, in an allocation, or one of the tasks of a step.
SLURM_PLACE=outside
[[ -n ${SLURM_JOB_ID:-} ]] && SLURM_PLACE=allocation
# Step 4294967290 is the shell that salloc opens on the first node.
[[ -n ${SLURM_STEP_ID:-} && $SLURM_STEP_ID != 4294967290 ]] && SLURM_PLACE=task
STEP_TASKS=${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-1}}
if [[ -z ${LAUNCHER:-} ]]; then
    LAUNCHER=slurm
    case $SLURM_PLACE in
        outside) [[ -n ${PARTITION:-} || (-n ${CLUSTER_GPUS:-} && -n $(command -v srun)) ]] || LAUNCHER=pytorch ;;
        task) ((STEP_TASKS > 1)) || LAUNCHER=pytorch ;; # `srun --pty bash` is a machine like any other
    esac
fi
is_count GPUS NODES GPUS_PER_NODE BATCH_SIZE PER_DEVICE_BATCH_SIZE CPUS_PER_TASK MASTER_PORT

HERE=$(gpus_here)
case $LAUNCHER-$SLURM_PLACE in
    pytorch-*) NODES=${NODES:-} PER_NODE=${GPUS:-$((HERE > 0 ? HERE : 1))} ;;
    slurm-task) GPUS=${GPUS:-$STEP_TASKS} NODES=${NODES:-${SLURM_STEP_NUM_NODES:-1}} PER_NODE=1 ;;
    slurm-allocation)
        NODES=${NODES:-${SLURM_JOB_NUM_NODES:-1}} PER_NODE=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-8}}
        ;;
    slurm-*) NODES=${NODES:-} PER_NODE=8 && [[ -n $NODES ]] || : "${GPUS:=${CLUSTER_GPUS:-}}" ;;
    *) stop "LAUNCHER=$LAUNCHER is neither pytorch nor slurm" ;;
esac
if [[ -n ${GPUS:-} ]]; then
    [[ -n $NODES ]] && PER_NODE=$((GPUS / NODES))
    : "${GPUS_PER_NODE:=$((GPUS < PER_NODE ? GPUS : PER_NODE))}"
    : "${NODES:=$((GPUS / (GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1)))}"
else
    : "${NODES:=1}" "${GPUS_PER_NODE:=$PER_NODE}"
    GPUS=$((NODES * GPUS_PER_NODE))
fi
((GPUS == NODES * GPUS_PER_NODE)) || stop "GPUS=$GPUS is not NODES=$NODES x GPUS_PER_NODE=$GPUS_PER_NODE"
if [[ $LAUNCHER == pytorch ]] && ((HERE > 0 && GPUS_PER_NODE > HERE)); then
    machine_lacks "GPUS=$GPUS asks for $GPUS_PER_NODE on this machine, which has $HERE"
fi
if [[ $LAUNCHER-$SLURM_PLACE == slurm-task ]] && ((GPUS != STEP_TASKS)); then
    stop "GPUS=$GPUS, but this step of SLURM has $STEP_TASKS tasks"
fi

if ((GPUS <= BATCH_SIZE && BATCH_SIZE < GPUS * PER_DEVICE_BATCH_SIZE)); then
    PER_DEVICE_BATCH_SIZE=$((BATCH_SIZE / GPUS))
    echo "launch.sh: micro-batches of $PER_DEVICE_BATCH_SIZE: BATCH_SIZE=$BATCH_SIZE gives no more to GPUS=$GPUS." >&2
fi
UNIT=$((PER_DEVICE_BATCH_SIZE * GPUS))
GRADIENT_ACC=$((BATCH_SIZE / UNIT))
if ((GRADIENT_ACC * UNIT != BATCH_SIZE)); then
    NEAREST=$((UNIT * (GRADIENT_ACC + 1)))
    ((GRADIENT_ACC == 0)) || NEAREST="$((UNIT * GRADIENT_ACC)) and $NEAREST"
    stop "BATCH_SIZE=$BATCH_SIZE is not a multiple of PER_DEVICE_BATCH_SIZE=$PER_DEVICE_BATCH_SIZE x GPUS=$GPUS" \
        "= $UNIT; nearest that are: $NEAREST"
fi

ARGS=( # what upstream's InternVL2.5 recipes share; those of other models override it in FLAGS
    --conv_style internvl2_5 --force_image_size 448 --down_sample_ratio 0.5 --ps_version v2
    --dynamic_image_size True --use_thumbnail True --max_dynamic_patch 6 --max_seq_length 8192 --group_by_length True
    --do_train True --num_train_epochs 1 --bf16 True --grad_checkpoint True --dataloader_num_workers 4
    --lr_scheduler_type cosine --warmup_ratio 0.03 --evaluation_strategy no
    --save_strategy steps --save_steps 200 --save_total_limit 1 --logging_steps 1 --report_to tensorboard
    --meta_path "$META_PATH" --output_dir "$OUTPUT_DIR"
    --per_device_train_batch_size "$PER_DEVICE_BATCH_SIZE" --gradient_accumulation_steps "$GRADIENT_ACC"
)
[[ -z ${MODEL_PATH:-} ]] || ARGS+=(--model_name_or_path "$MODEL_PATH")
[[ $ZERO_CONFIG == none ]] || ARGS+=(--deepspeed "$ZERO_CONFIG")
# shellcheck disable=SC2206 # several words are meant
ARGS+=(${FLAGS:-} "$@")

last_value() { # what the parser will see for flag $1
    local i value=
    for ((i = 0; i < ${#ARGS[@]}; i++)); do
        case ${ARGS[i]} in
            "$1") value=${ARGS[i + 1]:-} ;;
            "$1"=*) value=${ARGS[i]#*=} ;;
        esac
    done
    printf '%s' "$value"
}

MODEL=$(last_value --model_name_or_path)
META=$(last_value --meta_path)
OUTPUT=$(last_value --output_dir)
# ORG/NAME is downloaded from the hub, unless ORG is a folder here: then a path was meant.
if [[ -n $MODEL && ! -d $MODEL && (! $MODEL =~ ^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$ || -d ${MODEL%%/*}) ]]; then
    machine_lacks "MODEL_PATH=$MODEL is neither a directory nor a name ORG/MODEL on the hub"
fi
[[ -f $META ]] || machine_lacks "META_PATH=$META is not a file; shell/data/example.json is one to copy"
[[ -f $ENTRY ]] || machine_lacks "ENTRY=$ENTRY is not a file"

free_port() { # below the range from which systems take ports for outgoing connections
    local port
    while port=$((20000 + RANDOM % 10000)); do
        (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    echo "$port"
}

# Under SLURM a port that is not set is chosen where the tasks run, from the numbers of job and step (launchers.py).
case $LAUNCHER-$SLURM_PLACE in
    pytorch-*)
        if ((NODES > 1)) && [[ -z ${MASTER_ADDR:-} || -z ${NODE_RANK:-} ]]; then
            stop "NODES=$NODES with LAUNCHER=pytorch needs MASTER_ADDR and NODE_RANK: start the recipe on every node"
        fi
        ((NODES == 1)) || : "${MASTER_PORT:=34229}" # every node must know it
        : "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=$(free_port)}"
        CPUS_PER_TASK=${CPUS_PER_TASK:-$(($(env -u OMP_NUM_THREADS nproc) / GPUS_PER_NODE))}
        START=(python3 "$ROOT/shell/torchrun.py" --nnodes="$NODES" --node_rank="${NODE_RANK:-0}"
            --nproc_per_node="$GPUS_PER_NODE" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT")
        ;;
    slurm-task)
        CPUS_PER_TASK=${CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}
        START=(python3 -u)
        ;;
    slurm-*)
        command -v srun >/dev/null || machine_lacks "LAUNCHER=slurm needs srun, which is not on PATH"
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
        # shellcheck disable=SC2206 # several words are meant
        START+=(--cpus-per-task="$CPUS_PER_TASK" --kill-on-bad-exit=1 ${SRUN_ARGS:-} python3 -u)
        ;;
esac

COMMAND=(
    env LAUNCHER="$LAUNCHER" ${MASTER_PORT:+MASTER_PORT="$MASTER_PORT"} TF_CPP_MIN_LOG_LEVEL=3
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CPUS_PER_TASK > 0 ? CPUS_PER_TASK : 1))}"
    PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}"
    "${START[@]}" "$ENTRY" "${ARGS[@]}"
)
if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${COMMAND[@]}" && echo
    exit
fi

# shellcheck source=shell/setup.sh
source "$ROOT/shell/setup.sh"
[[ $LAUNCHER-$SLURM_PLACE == slurm-task && $SLURM_PROCID != 0 ]] && exec "${COMMAND[@]}" # task 0 keeps the log
mkdir -p "$OUTPUT" 2>/dev/null || stop "OUTPUT_DIR=$OUTPUT cannot be made"

# tee and this shell stay until the training has ended and the log is whole, whatever signals come. Those that reach the
# shell alone go on to the training; of a terminal's Ctrl-C it has heard. At SIGTERM srun would kill its tasks.
exec > >(trap '' INT TERM USR1 && exec tee -a "$OUTPUT/training_log.txt") 2>&1
LOG=$! ON_TERM=TERM
[[ ${START[0]} != srun ]] || ON_TERM=USR1
"${COMMAND[@]}" <&0 &
TRAINING=$!
pass_on() { HEARD=1 && { [[ $1 == INT ]] || kill -"$1" "$TRAINING" 2>/dev/null || true; }; }
trap 'pass_on INT' INT && trap 'pass_on USR1' USR1 && trap 'pass_on $ON_TERM' TERM
while HEARD='' STATUS=0 && { wait "$TRAINING" || STATUS=$?; } && [[ -n $HEARD ]]; do :; done
exec >&- 2>&-
wait "$LOG" || true
exit "$STATUS"
