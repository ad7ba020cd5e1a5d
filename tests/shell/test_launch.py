"""launch.sh: invalid inputs, SLURM, exit status and log."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers.live_runs import wait_until
from helpers.paths import EXAMPLE_META, REPO_ROOT, VISION_LORA_RECIPE
from helpers.recipe_runs import replace_training

NVIDIA_SMI = '#!/bin/sh\n[ "$1" = -L ] && printf "GPU 0: A (UUID: x)\\nGPU 1: A (UUID: y)\\n"\n'
JOB = {"SLURM_JOB_ID": 12345, "SLURM_JOB_NUM_NODES": 2, "SLURM_GPUS_ON_NODE": 4, "SLURM_CPUS_ON_NODE": 32}
TASK = JOB | {"SLURM_STEP_ID": 0, "SLURM_PROCID": 3, "SLURM_STEP_NUM_TASKS": 8, "SLURM_STEP_NUM_NODES": 2}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"GPUS": 3}, ["BATCH_SIZE=32", "GPUS=3", "= 3", "30 and 33"]),
        ({"GPUS": 8, "BATCH_SIZE": 4, "PER_DEVICE_BATCH_SIZE": 4}, ["BATCH_SIZE=4", "= 32", "nearest valid: 32."]),
        ({"GPUS": "two"}, ["GPUS=two is invalid: expected an integer >= 1"]),
        ({"PER_DEVICE_BATCH_SIZE": 0}, ["PER_DEVICE_BATCH_SIZE=0"]),
        ({"BATCH_SIZE": "08"}, ["BATCH_SIZE=08"]),
        ({"GPUS": 5, "NODES": 2}, ["GPUS=5", "NODES=2"]),
        ({"GPUS": 16, "GPUS_PER_NODE": 8}, ["NODES=2", "MASTER_ADDR and NODE_RANK"]),
        ({"MODEL_PATH": "./nowhere"}, ["MODEL_PATH=./nowhere"]),
        ({"MODEL_PATH": "folder/model"}, ["MODEL_PATH=folder/model"]),
        ({"META_PATH": "nowhere.json"}, ["META_PATH=nowhere.json", "example.json"]),
        ({"LAUNCHER": "magic"}, ["LAUNCHER=magic", "pytorch", "slurm"]),
        ({"LAUNCHER": "slurm", "GPUS": 8}, ["srun"]),
        ({"OUTPUT_DIR": "/dev/null/out"}, ["cannot create OUTPUT_DIR=/dev/null/out: Not a directory"]),
        (TASK | {"GPUS": 4}, ["GPUS=4", "8 tasks"]),
        ({"NODE_RANK": 7}, ["NODE_RANK=7 is invalid: expected an integer from 0 to 0, because NODES=1"]),
        ({"NODES": 2, "GPUS": 2, "NODE_RANK": 2, "MASTER_ADDR": "a"}, ["NODE_RANK=2", "from 0 to 1"]),
        ({"NODES": 2, "GPUS": 2, "NODE_RANK": "x", "MASTER_ADDR": "a"}, ["NODE_RANK=x", "from 0 to 1"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT=http"]),
        ({"MASTER_PORT": 99999}, ["MASTER_PORT=99999 is invalid: expected a port from 1 to 65535"]),
    ],
)
def test_invalid_input_is_one_sentence(bash, tmp_path, variables, words):
    (tmp_path / "folder").mkdir()
    done = bash(VISION_LORA_RECIPE, **{"CUDA_VISIBLE_DEVICES": ""} | variables)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith(".\n")
    assert all(word in done.stderr for word in words), done.stderr


def test_more_gpus_than_this_machine_has(bash, dry_run, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(NVIDIA_SMI)
    smi.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = bash(VISION_LORA_RECIPE, GPUS=4, **variables)
    assert done.returncode == 1
    assert done.stderr == "launch.sh: GPUS=4 needs 4 on this machine, which has 2.\n"
    assert "--nproc_per_node=2" in dry_run(VISION_LORA_RECIPE, **variables)[0], "all GPUs are the default"
    assert "--nproc_per_node=1" in dry_run(VISION_LORA_RECIPE, CUDA_VISIBLE_DEVICES=1, **variables)[0]
    assert "--nproc_per_node=4" in dry_run(VISION_LORA_RECIPE, GPUS=4, CUDA_VISIBLE_DEVICES=-1, **variables)[0], (
        "ranks on the CPU"
    )


@pytest.mark.parametrize(
    ("variables", "value"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, ""),
    ],
)
def test_gpu_memory_has_expandable_segments_unless_set(dry_run, variables, value):
    settings = [word for word in dry_run(VISION_LORA_RECIPE, **variables)[0] if "ALLOC_CONF=" in word]
    assert settings == [f"PYTORCH_ALLOC_CONF={value}", f"PYTORCH_CUDA_ALLOC_CONF={value}"]


def test_a_dry_run_only_warns_about_what_the_machine_lacks(bash):
    done = bash(
        VISION_LORA_RECIPE, DRY_RUN=1, GPUS=8, LAUNCHER="slurm", MODEL_PATH="./nowhere", META_PATH="nowhere.json"
    )
    assert done.returncode == 0
    assert done.stderr.count("warning") == done.stderr.count("\n") == 3
    assert bash(VISION_LORA_RECIPE, DRY_RUN=1, GPUS=3).returncode == 1


def test_the_users_flags_are_checked(bash):
    done = bash(VISION_LORA_RECIPE, "--meta_path=nowhere.json", META_PATH=__file__)
    assert (done.returncode, "META_PATH=nowhere.json" in done.stderr) == (1, True)


def test_several_nodes_without_slurm(dry_run):
    start, args = dry_run(
        VISION_LORA_RECIPE, NODES=2, GPUS=16, NODE_RANK=1, MASTER_ADDR="10.0.0.1", CUDA_VISIBLE_DEVICES=""
    )
    for word in ("--nnodes=2", "--node_rank=1", "--nproc_per_node=8", "--master_addr=10.0.0.1", "--master_port=34229"):
        assert word in start
    assert args[args.index("--gradient_accumulation_steps") + 1] == "2"


def test_the_micro_batch_size_is_at_most_the_samples_of_a_rank(bash, dry_run):
    variables = {"GPUS": 8, "BATCH_SIZE": 16, "PER_DEVICE_BATCH_SIZE": 4}
    done = bash(VISION_LORA_RECIPE, **variables, DRY_RUN=1)
    assert done.stderr == "launch.sh: micro-batch size reduced to 2: BATCH_SIZE=16 / GPUS=8.\n"
    _, args = dry_run(VISION_LORA_RECIPE, **variables)
    assert args[args.index("--per_device_train_batch_size") + 1] == "2"
    assert args[args.index("--gradient_accumulation_steps") + 1] == "1"


def test_slurm_outside_an_allocation(dry_run):
    start, args = dry_run(
        VISION_LORA_RECIPE, LAUNCHER="slurm", GPUS=16, PARTITION="big", SRUN_ARGS="--quotatype=reserved --time 60"
    )
    step = start[start.index("srun") :]
    assert step[1:-1] == [
        "--job-name=internvl2.5-8b_vit_lora",
        *("--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "-p", "big", "--gres=gpu:8"),
        *("--cpus-per-task=10", "--kill-on-bad-exit=1", "--quotatype=reserved", "--time", "60", "python3", "-u"),
    ]
    assert "LAUNCHER=slurm" in start
    assert args[args.index("--gradient_accumulation_steps") + 1] == "2"
    assert not any("gres" in word for word in dry_run(VISION_LORA_RECIPE, LAUNCHER="slurm", GPUS=2, GRES="none")[0])


CLUSTER_RECIPE = REPO_ROOT / "shell/internvl2.5/2nd_finetune/internvl2_5_38b_dynamic_res_2nd_finetune_full.sh"


def test_when_a_recipe_starts_srun(dry_run, tmp_path):
    def find_launcher(recipe, **variables):
        start, _ = dry_run(recipe, **variables)
        ntasks = [word for word in start if word.startswith(("--ntasks=", "--nproc_per_node="))]
        return "slurm" if "srun" in start else "pytorch", ntasks[0].split("=")[1]

    assert find_launcher(VISION_LORA_RECIPE, PARTITION="p") == ("slurm", "8")
    assert find_launcher(CLUSTER_RECIPE, PARTITION="p") == ("slurm", "16"), "CLUSTER_GPUS of the recipe"
    assert find_launcher(CLUSTER_RECIPE, PARTITION="p", GPUS=32) == ("slurm", "32")
    assert find_launcher(CLUSTER_RECIPE, PARTITION="p", NODES=4) == ("slurm", "32")
    assert find_launcher(CLUSTER_RECIPE) == ("pytorch", "1"), "a machine without SLURM"
    (tmp_path / "srun").symlink_to("/bin/true")
    path = f"{tmp_path}:/usr/bin:/bin"
    assert find_launcher(CLUSTER_RECIPE, PATH=path) == ("slurm", "16")
    assert find_launcher(CLUSTER_RECIPE, PATH=path, GPUS=8) == ("slurm", "8")
    assert find_launcher(CLUSTER_RECIPE, PATH=path, GPUS=8, LAUNCHER="pytorch") == ("pytorch", "8")
    assert find_launcher(VISION_LORA_RECIPE, PATH=path) == ("pytorch", "1")


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": 99}])
def test_world_size_counts_nodes_in_the_recipes_of_3_5(dry_run, variables):
    recipe = REPO_ROOT / "shell/internvl3_5_qwen3/internvl3_5_8b_sft.sh"
    start, args = dry_run(recipe, NPROC_PER_NODE=8, **variables)
    nodes = variables.get("WORLD_SIZE", 1)
    words = [f"--nnodes={nodes}", f"--node_rank={variables.get('RANK', 0)}", "--nproc_per_node=8"]
    words += [f"--master_addr={variables.get('MASTER_ADDR', '127.0.0.1')}"]
    words += [f"--master_port={port}"] if (port := variables.get("MASTER_PORT")) else []
    assert {*words} <= {*start}
    assert args[args.index("--gradient_accumulation_steps") + 1] == str(512 // 8 // nodes)


LAUNCH_SCRIPT = REPO_ROOT / "shell/launch.sh"
PLAIN_FLAGS = f"--meta_path {EXAMPLE_META} --output_dir out --learning_rate=1e-3".split()


def test_launch_sh_by_itself_passes_on_only_the_given_flags(dry_run):
    variables = {"MODEL_PATH": "other", "OUTPUT_DIR": "other", "BATCH_SIZE": 7, "FLAGS": "--other 1", "GPUS": 2}
    start, args = dry_run(LAUNCH_SCRIPT, *PLAIN_FLAGS, **variables)
    assert args == PLAIN_FLAGS
    assert "--nproc_per_node=2" in start
    assert dry_run(LAUNCH_SCRIPT, *PLAIN_FLAGS, ENTRY="internvl_chat_mpo.py")[0][-1].endswith("_mpo.py")
    start, _ = dry_run(LAUNCH_SCRIPT, *PLAIN_FLAGS, **JOB)
    assert {"srun", "--ntasks=8", "--job-name=internvl"} <= {*start}


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (LAUNCH_SCRIPT, [], "--meta_path and --output_dir are required: data sets, output folder"),
        (LAUNCH_SCRIPT, PLAIN_FLAGS[:2], "--meta_path and --output_dir are required: data sets, output folder"),
        (
            LAUNCH_SCRIPT,
            [*PLAIN_FLAGS, "--meta_path=no.json"],
            "--meta_path no.json is not a file; copy .*example.json",
        ),
        (VISION_LORA_RECIPE, ["--config", "run.yaml"], "--config replaces a recipe: internvl train --config FILE"),
        (VISION_LORA_RECIPE, ["--config=run.yaml"], "--config replaces a recipe: internvl train --config FILE"),
    ],
)
def test_plain_flags_and_recipes_have_their_own_messages(bash, script, flags, message):
    done = bash(script, *flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"launch.sh: {message}.\n", done.stderr), done.stderr


def test_the_python_that_trains_can_be_chosen(dry_run):
    for variables in ({}, TASK):
        start, _ = dry_run(VISION_LORA_RECIPE, INTERNVL_PYTHON="/a/python", **variables)
        assert "/a/python" in start and "python3" not in start


@pytest.mark.multiprocess
def test_a_chosen_python_needs_no_setup(bash, tmp_path):
    """setup.sh would stop without a compiler."""
    variables = replace_training(tmp_path, "import internvl, sys; print(sys.executable)") | {"CXX": "/bin/false"}
    done = bash(VISION_LORA_RECIPE, INTERNVL_PYTHON=sys.executable, **variables)
    assert done.stdout == f"{sys.executable}\n", done.stderr
    assert bash(VISION_LORA_RECIPE, **variables).returncode != 0


def test_an_installed_package_is_found_by_its_python(bash, tmp_path):
    package = tmp_path / "packages/internvl"
    shutil.copytree(REPO_ROOT / "shell", package / "shell")
    (package / "__init__.py").touch()
    done = bash(package / "shell/internvl2.5/8b_vit_lora.sh", DRY_RUN=1, PYTHONPATH="/mine")
    assert "PYTHONPATH" not in done.stdout
    assert f" {package}/train/internvl_chat_finetune.py " in done.stdout
    assert f" {package}/shell/torchrun.py " in done.stdout


@pytest.mark.parametrize("shell", [{}, {"SLURM_PROCID": 0}, {"SLURM_PROCID": 0, "SLURM_STEP_ID": 4294967290}])
def test_slurm_in_an_allocation(dry_run, shell):
    """Test sbatch, and salloc's shell on login node and first node."""
    start, _ = dry_run(VISION_LORA_RECIPE, **JOB, **shell)
    for word in ("srun", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=8", "LAUNCHER=slurm"):
        assert word in start
    assert not any("gres" in word for word in start), "a step inherits the GPUs of its allocation"


@pytest.mark.parametrize("restarts", [2, 3])
def test_an_interrupted_job_is_requeued_max_requeues_times(bash, tmp_path, restarts):
    """`scontrol` is a stub here; the real one ends the job."""
    (scontrol := tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@"\n')
    scontrol.chmod(0o755)
    (recipe := tmp_path / "recipe.sh").write_text("exit 85")
    env = {"RECIPE": recipe, "SLURM_JOB_ID": 7, "SLURM_RESTART_COUNT": restarts, "MAX_REQUEUES": 3}
    done = bash(REPO_ROOT / "shell/slurm/8b_vit_lora.sbatch", **env, PATH=f"{tmp_path}:/usr/bin:/bin")
    if restarts < 3:
        assert (done.returncode, done.stdout) == (0, "requeue 7\n")
    else:
        assert (done.returncode, done.stdout) == (85, "")
        assert done.stderr.startswith("this job was requeued MAX_REQUEUES=3 times")


def test_slurm_inside_a_task(dry_run):
    commands = [dry_run(VISION_LORA_RECIPE, **TASK | {"SLURM_PROCID": rank}) for rank in (0, 7)]
    assert commands[0] == commands[1], "all tasks use one port"
    start, args = commands[0]
    assert start[-3:-1] == ["python3", "-u"]
    assert "srun" not in start
    assert "LAUNCHER=slurm" in start
    assert args[args.index("--gradient_accumulation_steps") + 1] == "4"


def test_a_step_of_one_task_runs_torchrun(dry_run):
    start, _ = dry_run(
        VISION_LORA_RECIPE, **TASK | {"SLURM_STEP_NUM_TASKS": 1, "SLURM_PROCID": 0, "CUDA_VISIBLE_DEVICES": "0,1"}
    )
    assert "LAUNCHER=pytorch" in start
    assert "--nproc_per_node=2" in start


@pytest.mark.multiprocess
def test_exit_status_and_log(bash, tmp_path):
    code = "import os, sys\nprint(os.environ['LAUNCHER'], sys.argv[-1])\nsys.stderr.write('ends\\n')\nsys.exit(3)\n"
    variables = replace_training(tmp_path, code)
    for run in (1, 2):
        done = bash(VISION_LORA_RECIPE, "--last", f"word {run}", **variables)
        assert done.returncode == 3, done.stdout + done.stderr
        assert f"pytorch word {run}\n" in done.stdout
    log = (tmp_path / "out/training_log.txt").read_text()
    assert log.index("pytorch word 1") < log.index("pytorch word 2"), "the log is appended to"
    assert log.count("ends\n") == 2


SAVE_ON_SIGNAL = """
import os, signal, sys, time
received = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: received.append(number))
print("waiting", flush=True)
while not received:
    time.sleep(0.02)
time.sleep(0.5)
print("saving")
print("x" * 100_000)
print("saved")
sys.exit(85)
"""


def send_to_shell(process: psutil.Process, number: int) -> None:
    process.send_signal(number)


def send_to_all(process: psutil.Process, number: int) -> None:
    """Send a signal as SLURM does to each process of a step."""
    for one in (process, *process.children(recursive=True)):
        one.send_signal(number)


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("send_fn", [send_to_shell, send_to_all])
def test_preemption_signals_reach_the_training_and_its_log_is_complete(bash, tmp_path, number, send_fn):
    """Send each signal twice.

    The recipe runs as a task of SLURM, where `python3` is a child of its shell.
    """
    variables = TASK | {"SLURM_PROCID": 0, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "INTERNVL_VENV": "none"}
    env = {name: str(value) for name, value in (variables | replace_training(tmp_path, SAVE_ON_SIGNAL)).items()}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
    process = psutil.Popen(["bash", VISION_LORA_RECIPE], env=env | {"HOME": str(tmp_path)}, **streams)
    assert process.stdout.readline() == "waiting\n"
    for _ in range(2):
        send_fn(process, number)
        time.sleep(0.1)
    printed = process.communicate(timeout=20)[0]
    assert process.returncode == 85
    assert printed == f"saving\n{'x' * 100_000}\nsaved\n"
    assert (tmp_path / "out/training_log.txt").read_text() == f"waiting\n{printed}"


@pytest.mark.multiprocess
def test_two_ranks_connect(bash, tmp_path):
    code = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
print(f"sum {total.item()} threads {os.environ['OMP_NUM_THREADS']}\\n", end="")
dist.destroy_process_group()
"""
    done = bash(VISION_LORA_RECIPE, GPUS=2, OMP_NUM_THREADS=1, **replace_training(tmp_path, code))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sum 3 threads 1\n") == 2


@pytest.mark.multiprocess
def test_only_task_0_of_a_step_writes_the_log(bash, tmp_path):
    variables = replace_training(tmp_path, "import os; print('task', os.environ['SLURM_PROCID'])")
    for rank in (1, 0):
        assert bash(VISION_LORA_RECIPE, **TASK | variables | {"SLURM_PROCID": rank}).stdout == f"task {rank}\n"
    assert (tmp_path / "out/training_log.txt").read_text() == "task 0\n"


def test_a_dry_run_is_instant_and_writes_nothing(bash, tmp_path):
    start = time.monotonic()
    bash(VISION_LORA_RECIPE, DRY_RUN=1, INTERNVL_VENV="")
    assert time.monotonic() - start < 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.multiprocess
def test_the_command_of_a_dry_run_can_be_run(bash, tmp_path):
    variables = replace_training(tmp_path, "import sys; print(sys.argv[-1])") | TASK
    command = bash(VISION_LORA_RECIPE, "it's me", DRY_RUN=1, **variables).stdout
    assert subprocess.check_output(["bash", "-c", command], text=True) == "it's me\n"


INVALID_ENVIRONMENTS = {
    "OMP_NUM_THREADS": ("abc", "OMP_NUM_THREADS='abc' is invalid: expected an integer >= 1"),
    "CUDA_VISIBLE_DEVICES": ("zero", "CUDA_VISIBLE_DEVICES='zero' is invalid: expected numbers or UUIDs of GPUs"),
    "GLOO_SOCKET_IFNAME": ("none7", "GLOO_SOCKET_IFNAME='none7' is invalid: .* has no such network interface, only lo"),
    "NCCL_SOCKET_IFNAME": ("none7", "NCCL_SOCKET_IFNAME='none7' is invalid: .* has no such network interface, only lo"),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", INVALID_ENVIRONMENTS)
def test_an_invalid_environment_is_one_sentence(bash, tmp_path, name):
    value, message = INVALID_ENVIRONMENTS[name]
    done = bash(VISION_LORA_RECIPE, **replace_training(tmp_path, "print('started')") | {name: value})
    assert done.returncode == 1
    assert re.fullmatch(f"error: {message}.*\n", done.stdout), done.stdout + done.stderr


@pytest.mark.multiprocess
def test_inputs_in_the_output_folder_are_refused_before_anything_is_written(bash, tmp_path):
    variables = replace_training(tmp_path, "print('started')")
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(model)
    (data := tmp_path / "data").mkdir()
    (data / "train.jsonl").touch()
    (meta := tmp_path / "meta/data.json").parent.mkdir()
    meta.write_text(json.dumps({"a": {"annotation": str(data / "train.jsonl")}}))
    overlaps = {
        "is --model_name_or_path": {"OUTPUT_DIR": model},
        "is --model_name_or_path .*link": {"OUTPUT_DIR": model, "MODEL_PATH": tmp_path / "link"},
        "contains --model_name_or_path": {"OUTPUT_DIR": tmp_path},
        "is inside of --model_name_or_path": {"OUTPUT_DIR": model / "new/out"},
        "contains annotation of dataset a": {"OUTPUT_DIR": data, "META_PATH": meta},
        "contains --meta_path": {"OUTPUT_DIR": meta.parent, "META_PATH": meta},
    }
    files = sorted(tmp_path.rglob("*"))
    for message, changes in overlaps.items():
        done = bash(VISION_LORA_RECIPE, **variables | {"MODEL_PATH": model} | changes)
        assert done.returncode == 1 and done.stdout == "", done.stdout
        assert re.fullmatch(f"error: --output_dir .* {message}.*choose another folder.\n", done.stderr), done.stderr
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.multiprocess
@pytest.mark.parametrize("shell", ["{} | head -1", "{} <&- >&- 2>&-", "{} >/dev/full 2>&1"])
def test_the_log_is_complete_without_a_console(bash, tmp_path, shell):
    code = "import time\nfor n in range(200):\n    print('line', n, 'x' * 1000)\n    time.sleep(0.001)"
    command = shell.format(f"{VISION_LORA_RECIPE}")
    (tmp_path / "script").write_text(f"set -o pipefail; bash {command}")
    done = bash(tmp_path / "script", **replace_training(tmp_path, code))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/training_log.txt").read_text().count("line ") == 200


@pytest.mark.parametrize("make_fn", [os.mkfifo, os.mkdir])
def test_a_log_that_is_no_file_is_refused(bash, tmp_path, make_fn):
    """Opening a FIFO would wait for a reader."""
    variables = replace_training(tmp_path, "print('started')")
    (tmp_path / "out").mkdir(exist_ok=True)
    make_fn(tmp_path / "out/training_log.txt")
    done = bash(VISION_LORA_RECIPE, **variables)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == f"launch.sh: {tmp_path}/out/training_log.txt is not a regular file."


@pytest.mark.multiprocess
@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_is_a_preemption_signal_unless_nohup(bash, tmp_path, nohup):
    """SIGHUP goes to all processes, as from the kernel.

    A launcher that has it first may send SIGTERM to the ranks before SIGHUP reaches them.
    """
    code = """
import sys, time
from internvl.runtime.process import prepare_rank
from internvl.runtime.signals import preemption
prepare_rank()
preemption.start_training(0)
print("waiting", flush=True)
for _ in range(30):
    time.sleep(0.1)
print("signal", preemption.signal and preemption.signal.name)
"""
    variables = {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "INTERNVL_VENV": "none", "HOME": tmp_path, "GPUS": 2}
    env = {name: str(value) for name, value in (variables | replace_training(tmp_path, code)).items()}
    command = [*(["nohup"] if nohup else []), "bash", VISION_LORA_RECIPE]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = psutil.Popen(command, env=env, **streams)
    log = tmp_path / "out/training_log.txt"
    wait_until(
        lambda: log.exists() and log.read_text().count("waiting") == 2, lambda: log.read_text(), processes=[process]
    )
    send_to_all(process, signal.SIGHUP)
    assert process.wait(60) == 0
    signals = re.findall(r"^signal (\w+)$", log.read_text(), re.MULTILINE)
    assert len(signals) == 2 and {*signals} <= ({"None"} if nohup else {"SIGHUP", "SIGTERM"}), log.read_text()
