"""Sharing between real ranks."""

import subprocess
import sys
from pathlib import Path

from internvl.dist_utils import free_port, gather_objects, run_on_rank_0

PACKAGE = Path(__file__).parents[1] / "internvl_chat"


def test_one_process_shares_with_itself():
    assert gather_objects("x") == ["x"]
    assert run_on_rank_0(lambda: 5) == 5


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
