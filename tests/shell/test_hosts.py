"""torchrun and Open MPI connect ranks on two hosts with separate networks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from helpers.network_hosts import (
    MPIRUN_ENVIRONMENT,
    PRINT_PLACEMENT,
    Host,
    find_command,
    find_missing_requirement,
    parse_placement,
    start_two_hosts,
)
from helpers.paths import PACKAGE_DIR, VISION_LORA_RECIPE
from helpers.recipe_runs import replace_training

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if reason := find_missing_requirement():
        pytest.skip(f"requires two hosts: {reason}")
    with start_two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def start(host: Host, folder: Path, **variables: object) -> subprocess.Popen:
    """Start the recipe on one of two nodes, with `PRINT_PLACEMENT` as training."""
    recipe = replace_training(folder, PRINT_PLACEMENT) | {"OUTPUT_DIR": folder / host.name}
    recipe |= {"NODES": 2, "GPUS": 2, "MASTER_ADDR": "node1"} | variables
    env = os.environ | {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "INTERNVL_VENV": "none"}
    env |= {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in recipe.items()}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(host.wrap_command("bash", VISION_LORA_RECIPE), env=env, **streams)


def test_torchrun_connects_ranks_of_two_hosts(hosts, tmp_path):
    runs = [start(host, tmp_path, NODE_RANK=node, GPUS=4) for node, host in enumerate(hosts)]
    outputs = [run.communicate(timeout=90)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert parse_placement(outputs[0]) == "node1 34229 node1/0 node1/1 node2/0 node2/1".split()
    assert "placement" not in outputs[1]


def test_a_port_in_use_and_an_unknown_host_are_named(hosts, tmp_path):
    hosts[0].occupy_port(34229)
    port_in_use = start(hosts[0], tmp_path, NODE_RANK=0)
    unknown_host = start(hosts[1], tmp_path, NODE_RANK=1, MASTER_ADDR="node3")
    outputs = [run.communicate(timeout=60)[0] for run in (port_in_use, unknown_host)]
    assert (port_in_use.returncode, unknown_host.returncode) == (1, 1), outputs
    assert "error: port 34229 of node1 is already in use: set MASTER_PORT" in outputs[0]
    assert "error: node2 cannot resolve node3, the host of rank 0" in outputs[1]
    assert not any("Traceback" in output for output in outputs)


NOTICES = {  # NODE_RANK, MASTER_ADDR -> notice
    (1, "10.77.0.9"): r"node 1 of 2 \(node1\) waits for rank 0 at 10\.77\.0\.9:34230: (No route to host|timed out)",
    (1, "node2"): r"node 1 of 2 \(node1\) waits for rank 0 at node2:34230: Connection refused",
    (0, "node1"): r"node 0 \(node1\) waits for all 2 nodes to start; connected: none of the others",
}


@pytest.mark.parametrize(("node", "address"), NOTICES)
def test_a_node_says_that_it_waits(hosts, tmp_path, node, address):
    run = start(hosts[0], tmp_path, NODE_RANK=node, MASTER_ADDR=address, MASTER_PORT=34230)
    for line in run.stdout:
        if "waits for" in line:
            break
    inside = psutil.Process(run.pid).children()
    for process in inside:
        process.terminate()
    output = line + run.communicate(timeout=60)[0]
    assert run.returncode == 85, output
    assert re.match(NOTICES[node, address], output), output


def test_mpirun_on_one_host(hosts, tmp_path):
    """On two hosts: test_slurm.py."""
    if not find_command("mpirun"):
        pytest.skip("requires mpirun")
    (tmp_path / "entry.py").write_text(PRINT_PLACEMENT)
    env = os.environ | MPIRUN_ENVIRONMENT | {"PYTHONPATH": str(PACKAGE_DIR)}
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, tmp_path / "entry.py"]
    done = hosts[0].run(*command, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    address, _, *ranks = parse_placement(done.stdout)
    assert [address, *ranks] == ["127.0.0.1", "node1/0", "node1/1"]
