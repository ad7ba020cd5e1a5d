"""Wheel and sdist: what they hold, and a run from an installed package in an empty folder."""

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers.environments import (
    layer_environment,
    list_site_dirs,
    make_empty_layer,
    make_layer_or_skip,
    run_pip,
)
from helpers.evaluation_runs import write_evaluation_meta
from helpers.paths import PACKAGE_DIR, REPO_ROOT

from internvl import __version__

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def build_python() -> Path:
    """Return a Python that can build the package without the network."""
    return make_layer_or_skip("package", ["hatchling>=1.24", "editables"])


@pytest.fixture(scope="module")
def distributions(build_python, tmp_path_factory) -> Path:
    """Build sdist and wheel."""
    folder = tmp_path_factory.mktemp("distributions")
    build(build_python, REPO_ROOT, folder)
    return folder


def build(python: Path, source: Path, output: Path) -> None:
    command = [python, "-m", "hatchling", "build", "-d", output]
    done = subprocess.run(command, cwd=source, env=layer_environment(python), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(distributions) -> Path:
    return distributions / f"internvl_chat-{__version__}-py3-none-any.whl"


def test_wheel_holds_the_whole_package_and_its_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("internvl/")]
        info = f"internvl_chat-{__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        commands = archive.read(f"{info}/entry_points.txt").decode()
    assert commands.split() == "[console_scripts] internvl = internvl.__main__:main".split()
    top = PACKAGE_DIR / "internvl"
    files = [Path(folder, name) for folder, _, names in os.walk(top, followlinks=True) for name in names]
    expected = [f"internvl/{file.relative_to(top)}" for file in files if file.suffix != ".pyc"]
    assert sorted(names) == sorted(expected)
    assert {"internvl/shell/launch.sh", "internvl/tools/merge_lora.py"} < {*names}
    assert metadata["Version"] == __version__ and metadata["Requires-Python"] == ">=3.10"
    extras = {*metadata.get_all("Provides-Extra")}
    assert {"data", "video", "eval", "serve", "report", "deepspeed", "dev", "all"} < extras


def test_sdist_builds_the_same_wheel(build_python, distributions, wheel, tmp_path):
    with tarfile.open(distributions / f"internvl_chat-{__version__}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    build(build_python, tmp_path / f"internvl_chat-{__version__}", tmp_path)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


USE_PACKAGE_FILES = """
import json, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import internvl.tools.merge_lora
from internvl.arguments.deepspeed_config import read_deepspeed_config
from internvl.model.code_files import write_remote_code

assert internvl.__file__.startswith(sys.argv[1])
write_remote_code(sys.argv[2])
modules = [module.name for module in pkgutil.walk_packages(internvl.__path__, "internvl.")]
print(json.dumps([modules, read_deepspeed_config("zero_stage3_config.json")[1]["zero_optimization"]["stage"]]))
"""


def test_package_files_are_read_from_a_zip(wheel, goldens, tmp_path):
    """Regular packages and their files work on `sys.path` without being unpacked."""
    from helpers.tiny_models import make_tiny_checkpoint

    make_tiny_checkpoint(tmp_path / "model", goldens / "tokenizer")
    command = [sys.executable, "-c", USE_PACKAGE_FILES, wheel, tmp_path / "model"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules, stage = json.loads(done.stdout.splitlines()[-1])
    assert stage == 3
    assert (tmp_path / "model/modeling_internvl_chat.py").read_text().count("from .") > 0
    names = [
        re.sub(r"(/__init__)?\.py$", "", name) for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")
    ]
    expected = {name.replace("/", ".") for name in names} - {"internvl", "internvl.shell.torchrun"}
    assert {*modules} == expected, "a folder without __init__.py"


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed_package_trains_evaluates_merges_and_chats(kind, build_python, wheel, tiny_inputs, tmp_path):
    """The command works in an empty folder, with the Python that it is installed for, and installs nothing."""
    build_dirs = [str(path) for path in build_python.parents[1].glob("lib/python*/site-packages")]
    python = make_empty_layer(tmp_path / "env", [*build_dirs, *list_site_dirs()])
    source = [str(wheel)] if kind == "wheel" else ["--no-build-isolation", "-e", str(REPO_ROOT)]
    run_pip(python, ["--no-index", "--no-deps", *source])
    work = tmp_path / "work"
    work.mkdir()
    meta = write_evaluation_meta(tiny_inputs, tmp_path)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "INTERNVL_CACHE": str(tmp_path / "cache")}
    recipe = {"MODEL_PATH": f"{tiny_inputs}/model", "META_PATH": f"{tiny_inputs}/meta.json", "OUTPUT_DIR": "run"}
    recipe |= {"BATCH_SIZE": "2", "GPUS": "1", "ZERO_CONFIG": "none"}
    env = layer_environment(python, **hidden, **recipe)

    def internvl(*words: str) -> str:
        done = subprocess.run([python.parent / "internvl", *words], cwd=work, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    place = subprocess.check_output(
        [python, "-c", "import internvl; print(internvl.__file__)"], cwd=work, env=env, text=True
    )
    assert place.startswith(str(tmp_path / "env" if kind == "wheel" else PACKAGE_DIR))
    assert internvl("--version") == f"internvl {__version__}\n"
    tiny = "--force_image_size 56 --max_seq_length 512 --max_dynamic_patch 2 --use_packed_ds False --bf16 False"
    printed = internvl("train", "internvl2.5/1b_vit_lora", *tiny.split(), *"--max_steps 2 --report_to none".split())
    assert f"internvl {__version__}" in printed and "Training finished: 2 steps" in printed
    internvl("evaluate", "run", str(meta), "--output", "scores", "--eval_max_new_tokens", "4")
    assert (work / "scores").is_dir()
    internvl("merge", "run", "merged")
    assert f"by merging adapters (internvl {__version__})" in (work / "merged/README.md").read_text()
    assert internvl("chat", "merged", "What is it?", "--max_new_tokens", "4").strip()
    assert sorted(path.name for path in work.iterdir()) == ["merged", "run", "scores"]
