"""Launchers' environments, and sharing between real ranks."""

import subprocess
import sys
from pathlib import Path

import pytest

from internvl.dist_utils import free_port, from_first_rank, gathered, launch_environment

PACKAGE = Path(__file__).parents[1] / "internvl_chat"
WANTED = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
STARTED_BY = {
    "pytorch": WANTED,
    "slurm": {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "10.0.0.1"},
    "mpi": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
    },
}


@pytest.mark.parametrize("launcher", STARTED_BY)
@pytest.mark.parametrize("told", [True, False], ids=["told", "found out"])
def test_every_launcher_becomes_torchruns_environment(launcher, told):
    assert launch_environment(STARTED_BY[launcher], launcher if told else None) == WANTED


def test_a_process_that_nobody_launched_is_a_world_of_one():
    env = launch_environment({})
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("0", "1", "0")


def test_a_wrong_launcher_is_named():
    with pytest.raises(ValueError, match="unknown launcher 'ray'; known are pytorch, slurm, mpi"):
        launch_environment({}, "ray")
    with pytest.raises(ValueError, match="launcher slurm needs SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID"):
        launch_environment({}, "slurm")


def test_one_process_shares_with_itself():
    assert gathered("x") == ["x"]
    assert from_first_rank(lambda: 5) == 5


SHARING = """
import os, torch.distributed as dist
from internvl.dist_utils import from_first_rank, gathered, init_dist, rank, world_size
init_dist()
assert gathered(rank() * 10) == [0, 10] and world_size() == 2
assert from_first_rank(lambda: f"made by {rank()}") == "made by 0"
def fail():
    raise ValueError("only rank 0 saw this")
try:
    from_first_rank(fail)
except ValueError as error:
    assert str(error) == "only rank 0 saw this"
else:
    raise AssertionError("the error did not arrive")
dist.destroy_process_group()
"""


def test_results_and_errors_reach_every_rank(tmp_path):
    program = tmp_path / "sharing.py"
    program.write_text(SHARING)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = subprocess.run(
        [*command, program], env={"PYTHONPATH": str(PACKAGE), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
