"""Recipes on a real SLURM of two nodes, each with its own network: started in every way, interrupted in every way."""

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
from helpers.network_hosts import PLACES, find, places
from helpers.slurm_cluster import Cluster, cluster_lacks, slurm_cluster, until
from helpers.training_runs import ROOT, copy_model, losses, weights, write_meta  # noqa: E402
from test_launchers import NODE_LISTS  # noqa: E402

from internvl.launchers import first_node

RECIPE = ROOT / "shell/internvl2.5/8b_vit_lora.sh"
FLAGS = """--force_image_size 56 --max_dynamic_patch 4 --max_seq_length 512 --bf16 False --max_steps 60
    --save_steps 1000 --lr_scheduler_type constant --warmup_ratio 0 --dataloader_num_workers 1
    --report_to none""".split()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := cluster_lacks():
        pytest.skip(f"no SLURM: {reason}")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.env |= {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "INTERNVL_VENV": "none"}
        cluster.env |= {"OMP_NUM_THREADS": "1", "BATCH_SIZE": "4", "PER_DEVICE_BATCH_SIZE": "1"}
        yield cluster


@pytest.fixture(scope="module")
def tiny(goldens, tmp_path_factory) -> dict[str, str]:
    """A recipe's variables for a checkpoint and a data set that one core trains on."""
    folder = tmp_path_factory.mktemp("tiny")
    copy_model(goldens, folder)
    records = map(json.loads, (goldens / "dataset/ds_main.jsonl").read_text().splitlines())
    good = [record for record in records if record["conversations"][-1]["value"]]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, good)))
    write_meta(folder, goldens / "dataset/images")
    return {
        "MODEL_PATH": f"{folder}/model",
        "META_PATH": f"{folder}/meta.json",
        "INTERNVL_CACHE": f"{folder}/cache",
    }


def from_outside(cluster: Cluster, *flags: str, **variables):
    """A recipe at the login node, which sends two tasks to the cluster."""
    return cluster.run("bash", RECIPE, *flags, env=outside(variables))


def start_outside(cluster: Cluster, **variables) -> subprocess.Popen:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(cluster.login.command("bash", RECIPE), env=outside(variables) | cluster.env, **streams)


def outside(variables: dict[str, object]) -> dict[str, str]:
    launcher = {"LAUNCHER": "slurm", "PARTITION": "tiny", "GPUS": "2", "GPUS_PER_NODE": "1"}
    launcher |= {"GRES": "none", "CPUS_PER_TASK": "1"}
    return os.environ | launcher | {name: str(value) for name, value in variables.items()}


@pytest.fixture(scope="module")
def whole(cluster, tiny, tmp_path_factory) -> Path:
    """The output of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    done = from_outside(cluster, *FLAGS, **tiny, OUTPUT_DIR=output)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output


def assert_same(output: Path, whole: Path) -> None:
    assert losses(output) == losses(whole) and len(losses(whole)) == 60
    ours, theirs = weights(output), weights(whole)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


class Job:
    """A batch job of the file in shell/slurm/."""

    def __init__(self, cluster: Cluster, folder: Path, *flags: str, options: tuple[str, ...] = (), **variables):
        self.cluster, self.log = cluster, folder / "job.log"
        cpu = ["--parsable", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none", "--time=10", f"--chdir={ROOT}"]
        command = ["sbatch", *cpu, f"--output={self.log}", *options, "shell/slurm/8b_vit_lora.sbatch", *flags]
        done = cluster.run(*command, env=os.environ | {name: str(value) for name, value in variables.items()}, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    def is_now(self, field: str, value: object) -> bool:
        return f" {field}={value} " in re.sub(r"\s+", " ", self.cluster.says("scontrol", "show", "job", self.number))

    def printed(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, happened, seconds: float = 180) -> None:
        until(happened, seconds, lambda: self.cluster.says("squeue") + self.printed()[-5000:])

    def task(self, rank: int) -> psutil.Process:
        """The training's process of a rank."""
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] and process.info["cmdline"][0].endswith("python3"):
                env = process.environ()
                if (env.get("SLURM_JOB_ID"), env.get("SLURM_PROCID")) == (self.number, str(rank)):
                    return process
        raise AssertionError(f"task {rank} is not there")

    def goes_on(self, restarts: int) -> None:
        """It waits to be started again: after two minutes, or, if SLURM is asked, as soon as a second has passed."""
        self.wait(lambda: self.is_now("JobState", "PENDING") and self.is_now("Restarts", restarts))
        assert self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+2").returncode == 0


# -- trainings ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_srun_may_stand_before_the_recipe(cluster, timed, tiny, whole, tmp_path):
    """Inside a step the tasks find each other; from outside the recipe starts such a step: `whole`."""
    env = os.environ | tiny | {"OUTPUT_DIR": str(tmp_path / "out")}
    step = ["srun", "-N2", "-n2", "--kill-on-bad-exit=1", "bash", RECIPE, *FLAGS]
    done = cluster.run(*step, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_same(tmp_path / "out", whole)
    log = (tmp_path / "out/training_log.txt").read_text(errors="replace")
    assert log.count("'epoch': '0.25'") == 1, "rank 0 alone writes"


@pytest.mark.slow
def test_a_job_that_is_interrupted_ends_as_if_it_had_not_been(cluster, tiny, whole, tmp_path):
    output = tmp_path / "out"
    job = Job(cluster, tmp_path, *FLAGS, **tiny, OUTPUT_DIR=output)

    def steps(more: int) -> None:
        enough = job.printed().count("'grad_norm'") + more
        job.wait(lambda: job.printed().count("'grad_norm'") >= enough)

    def saved() -> int:
        (checkpoint,) = output.glob("checkpoint-*")
        return int(checkpoint.name.partition("-")[2])

    steps(3)
    job.task(1).send_signal(signal.SIGUSR1)  # to one of them: all save, and the job queues itself
    job.goes_on(1)
    first = saved()
    assert 3 <= first < 60

    steps(3)
    job.task(1).kill()  # nothing is saved, nobody goes on by himself
    job.wait(lambda: job.is_now("JobState", "FAILED"))
    assert "task 1: Killed" in job.printed() and saved() == first
    cluster.run("scontrol", "requeue", job.number)
    job.goes_on(2)

    steps(3)
    cluster.run("scontrol", "requeue", job.number)  # as preemption does: SIGTERM to everything of the job
    job.goes_on(3)
    second = saved()
    assert first + 3 <= second < 60

    job.wait(lambda: job.is_now("JobState", "COMPLETED"))
    assert_same(output, whole)


# -- the cluster with a training of a few lines ------------------------------------------------------------------------


def entry(folder: Path, code: str) -> dict[str, object]:
    """Variables that put `code` in place of the training."""
    (folder / "entry.py").write_text(code)
    meta = ROOT / "shell/data/example.json"
    return {"ENTRY": folder / "entry.py", "OUTPUT_DIR": folder / "out", "META_PATH": meta, "MODEL_PATH": "none/none"}


WAIT_FOR_SIGNAL = """
import os, signal, sys, time
told = []
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # srun's, when the other task has left
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
print(f"life {os.environ.get('SLURM_RESTART_COUNT', 0)} of task {os.environ['SLURM_PROCID']}\\n", end="")
while not told and "SLURM_RESTART_COUNT" not in os.environ:
    time.sleep(0.1)
sys.exit(85 if told else 0)
"""


@pytest.fixture(scope="module")
def timed(cluster, tmp_path_factory) -> Job:
    """A job near the end of its time, of which SLURM takes notice every 30 seconds: it waits while other tests run."""
    folder = tmp_path_factory.mktemp("timed")
    options = ("--time=2", "--signal=USR1@100")
    return Job(cluster, folder, options=options, **entry(folder, WAIT_FOR_SIGNAL))


@pytest.mark.slow
def test_the_signal_before_the_time_limit_starts_a_job_again(cluster, timed):
    timed.wait(lambda: timed.is_now("Restarts", 1))
    cluster.run("scontrol", "update", f"JobId={timed.number}", "StartTime=now+2")  # unless the two minutes are over
    timed.wait(lambda: timed.printed().count("life 1 of task") == 2)
    assert sorted(re.findall(r"life \d of task \d", timed.printed())) == [
        f"life {life} of task {task}" for life in (0, 1) for task in (0, 1)
    ]


def test_node_lists_are_read_as_scontrol_reads_them(cluster):
    for nodes, first in NODE_LISTS.items():
        assert cluster.says("scontrol", "show", "hostnames", nodes).splitlines()[0] == first == first_node(nodes)


def test_signals_to_the_shell_of_a_recipe_reach_the_tasks(cluster, tmp_path):
    """Also SIGTERM, at which srun would kill them."""
    shell = start_outside(cluster, **entry(tmp_path, WAIT_FOR_SIGNAL))
    log = tmp_path / "out/training_log.txt"
    until(lambda: log.exists() and log.read_text().count("life 0") == 2, 30, cluster.logs)
    inside = [process for process in psutil.Process(shell.pid).children() if process.name() == "bash"]
    inside[0].terminate()
    shell.communicate(timeout=30)
    assert shell.returncode == 85


ONE_FAILS = """
import os, sys, time
time.sleep(0 if os.environ["SLURM_PROCID"] == "1" else 100)
sys.exit(3)
"""


def test_a_task_that_fails_ends_the_others(cluster, tmp_path):
    start = time.monotonic()
    done = from_outside(cluster, **entry(tmp_path, ONE_FAILS))
    assert time.monotonic() - start < 20
    assert done.returncode == 128 + 15 and "task 1: Exited with exit code 3" in done.stdout  # the highest of both
    both = from_outside(cluster, **entry(tmp_path, "import sys; sys.exit(3)"))
    assert both.returncode in (3, 128 + 15), "143 where one ends so late that srun ends it"


def test_jobs_share_nodes_and_a_port_that_is_taken_is_told(cluster, tmp_path):
    variables = entry(tmp_path, PLACES)
    cluster.login.listen(23456)
    jobs = [start_outside(cluster, **variables, **port) for port in ({}, {}, {"MASTER_PORT": 23456})]
    printed = [job.communicate(timeout=90)[0] for job in jobs]
    assert [job.returncode == 0 for job in jobs] == [True, True, False], printed
    assert "error: port 23456 of node1 is taken by another program: set MASTER_PORT to one that is free" in printed[2]
    first, second = map(places, printed[:2])
    (first, port, *ranks), (second, other_port, *others) = map(places, printed[:2])
    assert first == second == "node1" and ranks == others == ["node1/0", "node2/0"] and port != other_port


def test_mpirun_in_an_allocation(cluster, tmp_path):
    if not find("mpirun"):
        pytest.skip("no mpirun on this machine")
    (tmp_path / "entry.py").write_text(PLACES)
    env = os.environ | {"PYTHONPATH": str(ROOT / "internvl_chat"), "LAUNCHER": "mpi"}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = cluster.run(*"salloc -N2 -n2 mpirun".split(), sys.executable, tmp_path / "entry.py", env=env | root)
    assert done.returncode == 0, done.stdout + done.stderr
    address, _, *ranks = places(done.stdout)
    assert [address, *ranks] == ["node1", "node1/0", "node2/0"]
