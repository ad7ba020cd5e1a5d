"""Results and errors are shared between ranks."""

import os
import subprocess
import sys

import pytest
from helpers.paths import PACKAGE_DIR

from internvl.dist_utils import gather_objects, run_on_rank_0
from internvl.launchers import find_free_port


def test_one_rank_shares_with_itself():
    assert gather_objects("x") == ["x"]
    assert run_on_rank_0(lambda: 5) == 5


SHARING = """
from internvl.dist_utils import gather_objects, get_rank, get_world_size, init_dist, run_on_rank_0
from internvl.torch_internals import destroy_process_groups
init_dist()
assert gather_objects(get_rank() * 10) == [0, 10] and get_world_size() == 2
assert run_on_rank_0(lambda: f"made by {get_rank()}") == "made by 0"
def fail():
    raise ValueError("raised on rank 0")
try:
    run_on_rank_0(fail)
except ValueError as error:
    assert str(error) == "raised on rank 0"
else:
    raise AssertionError("the error of rank 0 was not raised here")
destroy_process_groups()
"""


@pytest.mark.multiprocess
def test_results_and_errors_reach_every_rank(tmp_path):
    program = tmp_path / "sharing.py"
    program.write_text(SHARING)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={find_free_port()}"]
    done = subprocess.run(
        [*command, program],
        env={"PYTHONPATH": str(PACKAGE_DIR), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


BINDING = """
import torch, torch.distributed as dist
from internvl.dist_utils import init_dist
init_dist()
assert dist.get_backend() == "nccl" and dist.group.WORLD.bound_device_id == torch.device("cuda", 0)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.gpu
def test_a_rank_is_bound_to_its_gpu():
    env = os.environ | {"PYTHONPATH": str(PACKAGE_DIR)}
    done = subprocess.run([sys.executable, "-c", BINDING], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "device" not in done.stderr, "torch warns where a barrier has to guess the device"
