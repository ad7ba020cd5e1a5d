"""What every launcher tells its processes, as torchrun would tell it.

The variables are those of real runs (SLURM 22.05, Open MPI 4.1); tests/shell starts such runs.
"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from internvl.launchers import PORTS, first_node, launch_environment

PACKAGE = Path(__file__).parents[1] / "internvl_chat"
WANTED = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
JOB = {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_NODELIST": "node[1-4]", "SLURM_NTASKS": "16"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_STEP_NUM_TASKS": "8"}
STARTED_BY = {
    "pytorch": WANTED,
    "slurm": JOB | STEP | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
    "mpi": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
        "PMIX_NAMESPACE": "1223163905",
    },
}
SET = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("launcher", STARTED_BY)
@pytest.mark.parametrize("told", [True, False], ids=["told", "found out"])
def test_every_launcher_becomes_torchruns_environment(launcher, told):
    assert launch_environment(STARTED_BY[launcher] | SET, launcher if told else None) == WANTED


def test_mpirun_in_an_allocation_of_slurm():
    """Its processes are children of a daemon that srun started alone on its node: those variables are not theirs."""
    daemon = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "node2"}
    found = launch_environment(JOB | daemon | STARTED_BY["mpi"] | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("3", "8", "node1")


def test_a_process_that_nobody_launched_is_a_world_of_one():
    batch_script = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASK_PID": "866"}
    for env in ({}, batch_script):
        found = launch_environment(env)
        assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("0", "1", "0")


def test_a_wrong_launcher_is_named():
    with pytest.raises(ValueError, match="unknown launcher 'ray'; known are pytorch, mpi, slurm"):
        launch_environment({}, "ray")
    with pytest.raises(ValueError, match="slurm needs SLURM_PROCID, SLURM_STEP_NUM_TASKS, .* started by srun?"):
        launch_environment({}, "slurm")


def test_rank_0_is_where_its_step_begins():
    env = STARTED_BY["slurm"]
    assert launch_environment(env)["MASTER_ADDR"] == "node3"
    env = {name: value for name, value in env.items() if name != "SLURM_STEP_NODELIST"}
    assert launch_environment(env)["MASTER_ADDR"] == "node1"
    del env["SLURM_JOB_NODELIST"]
    assert launch_environment(env)["MASTER_ADDR"] == "node1"
    assert launch_environment(STARTED_BY["mpi"])["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(ValueError, match="mpirun -x MASTER_ADDR="):
        launch_environment(STARTED_BY["mpi"] | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})


NODE_LISTS = {  # what `scontrol show hostnames` says first; tests/shell/test_slurm.py asks it
    "node7": "node7",
    "gpu-a,node[1-3]": "gpu-a",
    "node[1-3,7],gpu-a": "node1",
    "node[7,1-3]": "node7",
    "n[001-010,12]": "n001",
    "rack[0-1]node[05-06]": "rack0node05",
    "r[2,4]-n[7-8]": "r2-n7",
    "node[12]": "node12",
}
SUFFIXED = {"n[1-2]-ib": "n1-ib", "node[1-2].example.org,x": "node1.example.org"}  # unknown to SLURM 22.05


@pytest.mark.parametrize(("nodes", "first"), (NODE_LISTS | SUFFIXED).items())
def test_node_lists_of_every_form(nodes, first):
    assert first_node(nodes) == first


def test_jobs_on_a_node_take_different_ports():
    """Also the steps of a job, and a job that starts again after its port was taken; all ranks the same one."""
    jobs = [("SLURM_JOB_ID", str(number)) for number in range(71, 81)]
    steps = [("SLURM_STEP_ID", str(number)) for number in range(1, 11)]
    again = [("SLURM_RESTART_COUNT", str(number)) for number in range(1, 11)]
    ports = [launch_environment(STARTED_BY["slurm"] | dict([change])) for change in jobs + steps + again]
    ports = [int(found["MASTER_PORT"]) for found in ports]
    assert len({*ports}) == 30 and all(port in PORTS for port in ports)
    assert int(launch_environment(STARTED_BY["slurm"] | {"SLURM_PROCID": "0"})["MASTER_PORT"]) == ports[0]
    mpi = [launch_environment(STARTED_BY["mpi"] | {"PMIX_NAMESPACE": name}) for name in "ab"]
    assert mpi[0]["MASTER_PORT"] != mpi[1]["MASTER_PORT"]


JOINING = "from internvl.dist_utils import init_dist\ninit_dist('slurm')"


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        env = STARTED_BY["slurm"] | {"SLURM_PROCID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env |= {"PYTHONPATH": str(PACKAGE), "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, "-c", JOINING], env=env, capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: port ") and f"port {port} of " in last and "set MASTER_PORT" in last
