"""Every launcher's variables become torchrun's.

The variables are those of real runs (SLURM 22.05, Open MPI 4.1); tests/shell starts such runs.
"""

import socket
import subprocess
import sys

import pytest
from helpers.paths import PACKAGE_DIR
from helpers.slurm_cluster import NODE_LISTS

from internvl import launchers
from internvl.launchers import (
    JOB_PORTS,
    count_local_ranks,
    find_free_port,
    launch_environment,
    parse_first_node,
    validate_environment,
    wait_for_rank_0,
)

EXPECTED = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
JOB = {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "node[1-4]", "SLURM_NODELIST": "node[1-4]", "SLURM_NTASKS": "16"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_STEP_NUM_TASKS": "8"}
ENVIRONMENTS = {  # by launcher, of rank 3
    "pytorch": EXPECTED,
    "slurm": JOB | STEP | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
    "mpi": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
        "PMIX_NAMESPACE": "1223163905",
    },
}
MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("launcher", ENVIRONMENTS)
@pytest.mark.parametrize("is_named", [True, False], ids=["named", "detected"])
def test_every_launcher_becomes_torchruns_environment(launcher, is_named):
    assert launch_environment(ENVIRONMENTS[launcher] | MASTER, launcher if is_named else None) == EXPECTED


def test_mpirun_in_a_slurm_allocation():
    """Its ranks inherit variables of a daemon.

    srun starts one daemon alone on each node; the ranks are its children.
    """
    daemon = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "node2"}
    env = launch_environment(JOB | daemon | ENVIRONMENTS["mpi"] | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"]) == ("3", "8", "node1")


def test_a_process_without_a_launcher_is_a_world_of_one_rank():
    batch_script = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASK_PID": "866"}
    for variables in ({}, batch_script):
        env = launch_environment(variables)
        assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("0", "1", "0")


def test_errors_name_the_launcher():
    with pytest.raises(ValueError, match="launcher 'ray' is not supported; expected one of pytorch, mpi, slurm"):
        launch_environment({}, "ray")
    with pytest.raises(ValueError, match="slurm requires SLURM_PROCID, SLURM_STEP_NUM_TASKS, .* started by srun?"):
        launch_environment({}, "slurm")


def test_rank_0_is_on_the_first_node_of_its_step():
    variables = ENVIRONMENTS["slurm"]
    assert launch_environment(variables)["MASTER_ADDR"] == "node3"
    variables = {name: value for name, value in variables.items() if name != "SLURM_STEP_NODELIST"}
    assert launch_environment(variables)["MASTER_ADDR"] == "node1"
    del variables["SLURM_JOB_NODELIST"]
    assert launch_environment(variables)["MASTER_ADDR"] == "node1"
    assert launch_environment(ENVIRONMENTS["mpi"])["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(ValueError, match="mpirun -x MASTER_ADDR="):
        launch_environment(ENVIRONMENTS["mpi"] | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})


# Suffixes, which SLURM 22.05 does not support.
SUFFIXED_NODE_LISTS = {"n[1-2]-ib": "n1-ib", "node[1-2].example.org,x": "node1.example.org"}


@pytest.mark.parametrize(("nodes", "first"), (NODE_LISTS | SUFFIXED_NODE_LISTS).items())
def test_first_node_of_a_node_list(nodes, first):
    assert parse_first_node(nodes) == first


def test_jobs_on_a_node_choose_different_ports():
    """So do steps of a job and requeued jobs; all ranks agree."""
    jobs = [("SLURM_JOB_ID", str(number)) for number in range(71, 81)]
    steps = [("SLURM_STEP_ID", str(number)) for number in range(1, 11)]
    restarts = [("SLURM_RESTART_COUNT", str(number)) for number in range(1, 11)]
    envs = [launch_environment(ENVIRONMENTS["slurm"] | dict([change])) for change in jobs + steps + restarts]
    ports = [int(env["MASTER_PORT"]) for env in envs]
    assert len({*ports}) == 30 and all(port in JOB_PORTS for port in ports)
    assert int(launch_environment(ENVIRONMENTS["slurm"] | {"SLURM_PROCID": "0"})["MASTER_PORT"]) == ports[0]
    mpi = [launch_environment(ENVIRONMENTS["mpi"] | {"PMIX_NAMESPACE": name}) for name in "ab"]
    assert mpi[0]["MASTER_PORT"] != mpi[1]["MASTER_PORT"]


INVALID_RANKS = {
    "RANK=2 is invalid: expected less than WORLD_SIZE=2": {"RANK": "2"},
    "RANK='-1' is invalid: expected an integer >= 0": {"RANK": "-1"},
    "WORLD_SIZE='two' is invalid": {"WORLD_SIZE": "two"},
    "LOCAL_RANK='' is invalid": {"LOCAL_RANK": ""},
    "MASTER_PORT=99999 is invalid: expected a port from 1 to 65535": {"MASTER_PORT": "99999"},
    "MASTER_PORT=0 is invalid": {"MASTER_PORT": "0"},
    "MASTER_PORT='http' is invalid": {"MASTER_PORT": "http"},
}


@pytest.mark.parametrize(("message", "changes"), INVALID_RANKS.items())
def test_invalid_ranks_and_ports(message, changes):
    with pytest.raises(ValueError, match=message):
        launch_environment({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | changes)


VALID_ENVIRONMENTS = [
    {},
    {"OMP_NUM_THREADS": "8", "CUDA_VISIBLE_DEVICES": "0,1"},
    {"OMP_NUM_THREADS": "4,2", "CUDA_VISIBLE_DEVICES": ""},
    {"CUDA_VISIBLE_DEVICES": "-1"},
    {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
    {"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c,MIG-GPU-8932/1/0"},
    {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "l"},
    {"NCCL_SOCKET_IFNAME": "=lo"},
    {"NCCL_SOCKET_IFNAME": "^docker,veth"},
]


@pytest.mark.parametrize("env", VALID_ENVIRONMENTS)
def test_valid_environments(env):
    validate_environment(env)


INVALID_ENVIRONMENTS = [
    {"OMP_NUM_THREADS": "0"},
    {"OMP_NUM_THREADS": "4x"},
    {"CUDA_VISIBLE_DEVICES": "cuda:0"},
    {"CUDA_VISIBLE_DEVICES": "0;1"},
    {"GLOO_SOCKET_IFNAME": "l"},
    {"NCCL_SOCKET_IFNAME": "=l"},
]


@pytest.mark.parametrize("env", INVALID_ENVIRONMENTS)
def test_invalid_environments(env):
    with pytest.raises(ValueError, match=f"{next(iter(env))}=.* is invalid"):
        validate_environment(env)


@pytest.mark.parametrize(
    ("env", "num_ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x3),2"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,8"}, 8),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "SLURM_TASKS_PER_NODE": "1"}, 2),
    ],
)
def test_ranks_of_a_machine_are_counted(env, num_ranks):
    assert count_local_ranks(env) == num_ranks


def test_a_rank_says_that_it_waits_for_rank_0(monkeypatch, capfd):
    monkeypatch.setattr(launchers, "NOTICE_SECONDS", 0.2)
    with pytest.raises(
        OSError, match=r"rank 1 of 2 did not reach rank 0 at 127.0.0.1:\d+ within 1 s \(Connection refused\)"
    ):
        wait_for_rank_0("127.0.0.1", find_free_port(), 1, "rank 1 of 2")
    assert capfd.readouterr().err.startswith("rank 1 of 2 waits for rank 0 at 127.0.0.1:")
    with socket.create_server(("127.0.0.1", 0)) as rank_0:
        wait_for_rank_0("127.0.0.1", rank_0.getsockname()[1], 1, "rank 1 of 2")
    assert not capfd.readouterr().err


JOIN = "from internvl.dist_utils import init_dist\ninit_dist('slurm')"


@pytest.mark.multiprocess
def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        env = ENVIRONMENTS["slurm"] | {"SLURM_PROCID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env |= {"PYTHONPATH": str(PACKAGE_DIR), "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, "-c", JOIN], env=env, capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError: port ") and f"port {port} of " in last and "set MASTER_PORT" in last
