"""Recipes are started and interrupted on a real SLURM of two nodes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers.live_runs import count_logged_steps, wait_until
from helpers.network_hosts import MPIRUN_ENVIRONMENT, PRINT_PLACEMENT, find_command, parse_placement
from helpers.paths import PACKAGE_DIR, REPO_ROOT, VISION_LORA_RECIPE
from helpers.recipe_runs import replace_training
from helpers.slurm_cluster import NODE_LISTS, Cluster, find_missing_cluster_requirement, start_slurm_cluster
from helpers.training_runs import copy_tiny_model, load_weights, read_losses, write_meta_file

from internvl.launchers import parse_first_node

pytestmark = pytest.mark.e2e
FLAGS = """--force_image_size 56 --max_dynamic_patch 4 --max_seq_length 512 --bf16 False --max_steps 60
    --save_steps 1000 --use_packed_ds False --lr_scheduler_type constant --warmup_ratio 0 --dataloader_num_workers 1
    --report_to none""".split()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := find_missing_cluster_requirement():
        pytest.skip(f"requires SLURM: {reason}")
    with start_slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.env |= {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "INTERNVL_VENV": "none"}
        cluster.env |= {"OMP_NUM_THREADS": "1", "BATCH_SIZE": "4", "PER_DEVICE_BATCH_SIZE": "1"}
        yield cluster


@pytest.fixture(scope="module")
def recipe_variables(goldens, tmp_path_factory) -> dict[str, str]:
    """Make a tiny checkpoint and data set; return the variables of both."""
    folder = tmp_path_factory.mktemp("tiny")
    copy_tiny_model(goldens, folder)
    records = map(json.loads, (goldens / "dataset/ds_main.jsonl").read_text().splitlines())
    with_answer = [record for record in records if record["conversations"][-1]["value"]]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, with_answer)))
    write_meta_file(folder, goldens / "dataset/images")
    return {
        "MODEL_PATH": f"{folder}/model",
        "META_PATH": f"{folder}/meta.json",
        "INTERNVL_CACHE": f"{folder}/cache",
    }


def run_from_login_node(cluster: Cluster, *flags: str, **variables):
    """Run the recipe on the login node, where srun starts two tasks."""
    return cluster.run("bash", VISION_LORA_RECIPE, *flags, env=login_environment(variables))


def start_from_login_node(cluster: Cluster, **variables) -> subprocess.Popen:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = cluster.login.wrap_command("bash", VISION_LORA_RECIPE)
    return subprocess.Popen(command, env=login_environment(variables) | cluster.env, **streams)


def login_environment(variables: dict[str, object]) -> dict[str, str]:
    launcher = {"LAUNCHER": "slurm", "PARTITION": "tiny", "GPUS": "2", "GPUS_PER_NODE": "1"}
    launcher |= {"GRES": "none", "CPUS_PER_TASK": "1"}
    return os.environ | launcher | {name: str(value) for name, value in variables.items()}


@pytest.fixture(scope="module")
def unbroken_run(cluster, recipe_variables, tmp_path_factory) -> Path:
    """Train without an interruption; return the output folder."""
    output = tmp_path_factory.mktemp("unbroken")
    done = run_from_login_node(cluster, *FLAGS, **recipe_variables, OUTPUT_DIR=output)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output


def assert_equal_runs(output: Path, unbroken_run: Path) -> None:
    assert read_losses(output) == read_losses(unbroken_run) and len(read_losses(unbroken_run)) == 60
    ours, expected = load_weights(output), load_weights(unbroken_run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


class Job:
    """A batch job of a script, by default shell/slurm/8b_vit_lora.sbatch."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *flags: str,
        options: tuple[str, ...] = (),
        script: str = "shell/slurm/8b_vit_lora.sbatch",
        **variables,
    ):
        self.cluster, self.log = cluster, folder / "job.log"
        cpu = [
            "--parsable",
            "--ntasks-per-node=1",
            "--cpus-per-task=1",
            "--gres=none",
            "--time=10",
            f"--chdir={REPO_ROOT}",
        ]
        command = ["sbatch", *cpu, f"--output={self.log}", *options, script, *flags]
        done = cluster.run(
            *command, env=os.environ | {name: str(value) for name, value in variables.items()}, cwd=REPO_ROOT
        )
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    def has_state(self, field: str, value: object) -> bool:
        """Check a field of `scontrol show job`."""
        state = self.cluster.read_output("scontrol", "show", "job", self.id)
        return f" {field}={value} " in re.sub(r"\s+", " ", state)

    def printed(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_until(self, condition_fn, seconds: float = 180) -> None:
        wait_until(condition_fn, lambda: self.cluster.read_output("squeue") + self.printed()[-5000:], seconds)

    def find_task(self, rank: int) -> psutil.Process:
        """Find the training process of a rank."""
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] and Path(process.info["cmdline"][0]).name.startswith("python"):
                env = process.environ()
                if (env.get("SLURM_JOB_ID"), env.get("SLURM_PROCID")) == (self.id, str(rank)):
                    return process
        raise AssertionError(f"task {rank} does not run")

    def start_requeued(self, num_restarts: int) -> None:
        """Wait until the job is requeued; start it before SLURM's two minutes."""
        self.wait_until(lambda: self.has_state("JobState", "PENDING") and self.has_state("Restarts", num_restarts))
        assert self.cluster.run("scontrol", "update", f"JobId={self.id}", "StartTime=now+2").returncode == 0


# -- trainings ---------------------------------------------------------------------------------------------------------


def test_a_recipe_started_by_srun_equals_one_that_starts_srun(
    cluster, job_near_time_limit, recipe_variables, unbroken_run, tmp_path
):
    env = os.environ | recipe_variables | {"OUTPUT_DIR": str(tmp_path / "out")}
    step = ["srun", "-N2", "-n2", "--kill-on-bad-exit=1", "bash", VISION_LORA_RECIPE, *FLAGS]
    done = cluster.run(*step, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_equal_runs(tmp_path / "out", unbroken_run)
    log = (tmp_path / "out/training_log.txt").read_text(errors="replace")
    assert count_logged_steps(log) == 60, "rank 0 alone writes the log"


def test_the_example_requeues_and_equals_an_unbroken_run(cluster, recipe_variables, unbroken_run, tmp_path):
    """The job of examples/slurm, with the installed command in place of the image."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/internvl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m internvl "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:{cluster.env['PATH']}"
    variables = recipe_variables | {"CONTAINER": f"env PATH={path}", "PYTHONPATH": PACKAGE_DIR}
    output = tmp_path / "out"
    words = [variables.pop("META_PATH"), str(output), *FLAGS]
    job = Job(cluster, tmp_path, *words, script="examples/slurm/train.sbatch", **variables)
    job.wait_until(lambda: count_logged_steps(job.printed()) >= 3)
    job.find_task(1).send_signal(signal.SIGUSR1)
    job.start_requeued(1)
    job.wait_until(lambda: job.has_state("JobState", "COMPLETED"))
    assert "Resuming from checkpoint-" in job.printed()
    assert_equal_runs(output, unbroken_run)


def test_an_interrupted_job_equals_an_unbroken_run(cluster, recipe_variables, unbroken_run, tmp_path):
    output = tmp_path / "out"
    job = Job(cluster, tmp_path, *FLAGS, **recipe_variables, OUTPUT_DIR=output)

    def wait_for_steps(num_steps: int) -> None:
        target = count_logged_steps(job.printed()) + num_steps
        job.wait_until(lambda: count_logged_steps(job.printed()) >= target)

    def find_saved_step() -> int:
        (checkpoint,) = output.glob("checkpoint-*")
        return int(checkpoint.name.partition("-")[2])

    wait_for_steps(3)
    job.find_task(1).send_signal(signal.SIGUSR1)  # to one task: all save, and the job requeues itself
    job.start_requeued(1)
    first = find_saved_step()
    assert 3 <= first < 60

    wait_for_steps(3)
    job.find_task(1).kill()  # no checkpoint, no requeue
    job.wait_until(lambda: job.has_state("JobState", "FAILED"))
    assert "task 1: Killed" in job.printed() and find_saved_step() == first
    cluster.run("scontrol", "requeue", job.id)
    job.start_requeued(2)

    wait_for_steps(3)
    cluster.run("scontrol", "requeue", job.id)  # like preemption: SIGTERM to all processes of the job
    job.start_requeued(3)
    second = find_saved_step()
    assert first + 3 <= second < 60

    job.wait_until(lambda: job.has_state("JobState", "COMPLETED"))
    assert_equal_runs(output, unbroken_run)


# -- the cluster with a training of a few lines ------------------------------------------------------------------------


WAIT_FOR_SIGNAL = """
import os, signal, sys, time
received = []
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # srun sends it when the other task has exited
signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
print(f"start {os.environ.get('SLURM_RESTART_COUNT', 0)} of task {os.environ['SLURM_PROCID']}\\n", end="")
while not received and "SLURM_RESTART_COUNT" not in os.environ:
    time.sleep(0.1)
sys.exit(85 if received else 0)
"""


@pytest.fixture(scope="module")
def job_near_time_limit(cluster, tmp_path_factory) -> Job:
    """Start a job near its time limit.

    SLURM checks time limits every 30 seconds. Other tests run meanwhile.
    """
    folder = tmp_path_factory.mktemp("time_limit")
    options = ("--time=2", "--signal=USR1@100")
    return Job(cluster, folder, options=options, **replace_training(folder, WAIT_FOR_SIGNAL))


def test_the_signal_before_the_time_limit_requeues_a_job(cluster, job_near_time_limit):
    job = job_near_time_limit
    job.wait_until(lambda: job.has_state("Restarts", 1))
    cluster.run("scontrol", "update", f"JobId={job.id}", "StartTime=now+2")  # no effect after SLURM's two minutes
    job.wait_until(lambda: job.printed().count("start 1 of task") == 2)
    assert sorted(re.findall(r"start \d of task \d", job.printed())) == [
        f"start {start} of task {task}" for start in (0, 1) for task in (0, 1)
    ]


def test_node_lists_are_parsed_as_scontrol_does(cluster):
    for nodes, first in NODE_LISTS.items():
        hostnames = cluster.read_output("scontrol", "show", "hostnames", nodes).splitlines()
        assert hostnames[0] == first == parse_first_node(nodes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_signals_to_the_shell_of_a_recipe_reach_the_tasks(cluster, tmp_path, number):
    """As SIGUSR1: at other signals srun would kill its tasks. A killed shell cannot forward: the kernel does."""
    code = WAIT_FOR_SIGNAL.replace("sys.exit(85", "print('saved'); sys.exit(85")
    shell = start_from_login_node(cluster, **replace_training(tmp_path, code))
    log = tmp_path / "out/training_log.txt"
    wait_until(lambda: log.exists() and log.read_text().count("start 0") == 2, cluster.read_logs, 30)
    inside = [process for process in psutil.Process(shell.pid).children() if process.name() == "bash"]
    inside[0].send_signal(number)
    shell.communicate(timeout=60)
    assert shell.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 85)
    assert log.read_text().count("saved") == 2
    wait_until(lambda: not cluster.read_output("squeue", "-h"), cluster.read_logs, 30)


TAKE_LOCK = """
import json, os, sys, time
from dataclasses import asdict, replace
from pathlib import Path
from internvl.runtime.output_lock import LOCK_FILE, OutputLock, describe_this_process
folder, job = Path(sys.argv[1]), sys.argv[2]
holder = replace(describe_this_process("other"), machine="another", host="node7", job=job, job_start="0")
(folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
start = time.monotonic()
OutputLock(folder, "new")
print(time.monotonic() - start < 5)
"""


def test_the_lock_of_a_job_that_has_ended_is_replaced(cluster, tmp_path):
    done = cluster.run("sbatch", "--parsable", "--wait", "--wrap=true", f"--output={tmp_path}/job")
    env = os.environ | {"PYTHONPATH": str(PACKAGE_DIR)}
    for job in (done.stdout.strip(), "999999"):
        taken = cluster.run(sys.executable, "-c", TAKE_LOCK, tmp_path, job, env=env)
        assert taken.stdout == "True\n", taken.stdout + taken.stderr


TASK_1_FAILS = """
import os, sys, time
time.sleep(0 if os.environ["SLURM_PROCID"] == "1" else 100)
sys.exit(3)
"""


def test_a_failed_task_ends_the_others(cluster, tmp_path):
    start = time.monotonic()
    done = run_from_login_node(cluster, **replace_training(tmp_path, TASK_1_FAILS))
    assert time.monotonic() - start < 20
    assert done.returncode == 128 + 15 and "task 1: Exited with exit code 3" in done.stdout  # the higher one
    both = run_from_login_node(cluster, **replace_training(tmp_path, "import sys; sys.exit(3)"))
    assert both.returncode in (3, 128 + 15), "143 if srun ends the slower task"


def test_jobs_share_nodes_and_a_port_in_use_is_named(cluster, tmp_path):
    variables = replace_training(tmp_path, PRINT_PLACEMENT)
    cluster.login.occupy_port(23456)
    jobs = [start_from_login_node(cluster, **variables, **port) for port in ({}, {}, {"MASTER_PORT": 23456})]
    outputs = [job.communicate(timeout=90)[0] for job in jobs]
    assert [job.returncode == 0 for job in jobs] == [True, True, False], outputs
    assert "error: port 23456 of node1 is already in use: set MASTER_PORT to a free port" in outputs[2]
    (address, port, *ranks), (other_address, other_port, *other_ranks) = map(parse_placement, outputs[:2])
    assert address == other_address == "node1" and port != other_port
    assert ranks == other_ranks == ["node1/0", "node2/0"]


def test_mpirun_in_an_allocation(cluster, tmp_path):
    if not find_command("mpirun"):
        pytest.skip("requires mpirun")
    (tmp_path / "entry.py").write_text(PRINT_PLACEMENT)
    env = os.environ | MPIRUN_ENVIRONMENT | {"PYTHONPATH": str(PACKAGE_DIR)}
    done = cluster.run(*"salloc -N2 -n2 mpirun".split(), sys.executable, tmp_path / "entry.py", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    address, _, *ranks = parse_placement(done.stdout)
    assert [address, *ranks] == ["node1", "node1/0", "node2/0"]
