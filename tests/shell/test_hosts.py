"""torchrun and Open MPI on two hosts, each with its own network and its own 127.0.0.1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.network_hosts import PLACES, Host, find, lacking, places, two_hosts
from helpers.training_runs import ROOT

RECIPE = ROOT / "shell/internvl2.5/8b_vit_lora.sh"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if reason := lacking():
        pytest.skip(f"no two hosts: {reason}")
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def start(host: Host, folder: Path, **variables: object) -> subprocess.Popen:
    """The recipe on one of two nodes, with `PLACES` in place of the training."""
    (folder / "entry.py").write_text(PLACES)
    named = {"ENTRY": folder / "entry.py", "OUTPUT_DIR": folder / host.name, "MODEL_PATH": "none/none"}
    named |= {"META_PATH": ROOT / "shell/data/example.json", "NODES": 2, "GPUS": 2, "MASTER_ADDR": "node1"} | variables
    env = os.environ | {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "INTERNVL_VENV": "none"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in named.items()}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(host.command("bash", RECIPE), env=env, **streams)


def test_torchrun_meets_on_the_first_host(hosts, tmp_path):
    runs = [start(host, tmp_path, NODE_RANK=node, GPUS=4) for node, host in enumerate(hosts)]
    printed = [run.communicate(timeout=90)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed
    assert places(printed[0]) == "node1 34229 node1/0 node1/1 node2/0 node2/1".split()
    assert "places" not in printed[1]


def test_what_keeps_hosts_apart_is_told(hosts, tmp_path):
    hosts[0].listen(34229)
    taken = start(hosts[0], tmp_path, NODE_RANK=0)
    unknown = start(hosts[1], tmp_path, NODE_RANK=1, MASTER_ADDR="node3")
    printed = [run.communicate(timeout=60)[0] for run in (taken, unknown)]
    assert (taken.returncode, unknown.returncode) == (1, 1), printed
    assert "error: port 34229 of node1 is taken by another program: set MASTER_PORT" in printed[0]
    assert "error: node2 finds no address of node3, where rank 0 runs" in printed[1]
    assert not any("Traceback" in one for one in printed)


MPIRUN = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "LAUNCHER": "mpi"}


def test_mpirun_on_one_host(hosts, tmp_path):
    """test_slurm.py has it on two."""
    if not find("mpirun"):
        pytest.skip("no mpirun on this machine")
    (tmp_path / "entry.py").write_text(PLACES)
    env = os.environ | MPIRUN | {"PYTHONPATH": str(ROOT / "internvl_chat")}
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, tmp_path / "entry.py"]
    done = hosts[0].run(*command, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    address, _, *ranks = places(done.stdout)
    assert [address, *ranks] == ["127.0.0.1", "node1/0", "node1/1"]
