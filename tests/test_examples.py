"""Examples of clusters: their own libraries accept them, and each node starts its ranks.

tests/shell/test_slurm.py runs the example of SLURM.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.environments import make_layer_or_skip
from helpers.paths import PACKAGE_DIR, REPO_ROOT

pytestmark = pytest.mark.multiprocess
KUBERNETES = REPO_ROOT / "examples/kubernetes/train.yaml"
SKYPILOT = REPO_ROOT / "examples/skypilot/train.yaml"
KUBERNETES_VERSIONS = ("1.31", "1.37")
VALIDATE_KUBERNETES = """
import sys, kubernetes_validate, yaml
path, *versions = sys.argv[1:]
for document in yaml.safe_load_all(open(path)):
    for version in versions:
        kubernetes_validate.validate(document, version, strict=True)
"""
VALIDATE_SKYPILOT = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
print(json.dumps({"nodes": task.num_nodes, "gpus": resources.accelerators, "run": task.run, "envs": task.envs}))
"""


def dry_run(command: list[str], folder: Path, **variables: str) -> list[str]:
    """Return the command that a node would start."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env = inherited | {"DRY_RUN": "1", "PYTHONPATH": str(PACKAGE_DIR)} | variables
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def read_kubernetes() -> tuple[dict, dict]:
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    return service, job


def test_kubernetes_accepts_its_example():
    python = make_layer_or_skip("kubernetes", ["kubernetes-validate==1.37.0"])
    command = [python, "-c", VALIDATE_KUBERNETES, KUBERNETES, *KUBERNETES_VERSIONS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_pods_find_each_other():
    service, job = read_kubernetes()
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    (address,) = [entry["value"] for entry in pod["containers"][0]["env"] if entry["name"] == "MASTER_ADDR"]
    assert address == f"{job['metadata']['name']}-0.{service['metadata']['name']}"


@pytest.mark.parametrize("index", [0, 1])
def test_a_pod_starts_the_ranks_of_its_node(tmp_path, index):
    _, job = read_kubernetes()
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value", str(index)) for entry in container["env"]}
    program, *words = container["command"] + container["args"]
    assert program == "internvl"
    command = dry_run([sys.executable, "-m", "internvl", *words], tmp_path, **variables)
    assert {f"--node_rank={index}", "--nnodes=2", "--nproc_per_node=8", "--master_addr=internvl-0.internvl"} <= {
        *command
    }
    assert int(variables["GPUS"]) == job["spec"]["completions"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 100
    assert "--save_on_signal_seconds=100" in command


def test_skypilot_accepts_its_example(tmp_path):
    python = make_layer_or_skip("skypilot", ["skypilot==0.14.1"])
    env = os.environ | {"HOME": str(tmp_path)}  # it writes to ~/.sky
    command = [python, "-c", VALIDATE_SKYPILOT, SKYPILOT]
    done = subprocess.run(command, env=env, cwd=REPO_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    task = json.loads(done.stdout.splitlines()[-1])
    assert task["nodes"] == 2 and task["gpus"] == {"H100": 8}
    assert task["run"] == yaml.safe_load(SKYPILOT.read_text())["run"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rented_node_starts_its_ranks(tmp_path, rank):
    program = tmp_path / "internvl/bin/internvl"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m internvl "$@"\n')
    program.chmod(0o755)
    example = yaml.safe_load(SKYPILOT.read_text())
    variables = {"HOME": str(tmp_path), "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(rank)}
    variables |= {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    command = dry_run(["bash", "-c", example["run"]], tmp_path, **variables, MODEL_PATH=example["envs"]["MODEL_PATH"])
    assert f"--nnodes=2 --node_rank={rank} --nproc_per_node=8 --master_addr=10.0.0.7" in " ".join(command)


def test_paths_in_comments_exist():
    for example in (REPO_ROOT / "examples").glob("*/*"):
        for path in re.findall(r"\b(?:examples|docker|docs)/[\w./]+\w", example.read_text()):
            assert (REPO_ROOT / path).exists(), f"{example.name}: {path}"
