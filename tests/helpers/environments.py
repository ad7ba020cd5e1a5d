"""Make environments with other versions of some packages, beside the main one.

Most are layers over the environment that runs this code. What is installed in the layer comes first; everything else,
above all torch, is found in the main environment through a path file. So a layer takes seconds to make. An environment
with another Python or torch is complete. All are kept in `.venv-NAME`.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import REPO_ROOT


def make_environment_layer(name: str, requirements: list[str]) -> Path:
    """Install packages into `.venv-NAME` and return its Python.

    It is made again when the requirements or the main environment have changed.

    Raises:
        OSError: pip failed; the message is the end of its output.
    """
    folder = REPO_ROOT / f".venv-{name}"
    site_dirs = list_site_dirs()
    wanted = "\n".join([sys.version, str(folder), *site_dirs, *requirements])
    stamp, python = folder / "installed", folder / "bin/python"
    with open(REPO_ROOT / "requirements.txt") as lock:  # one installation at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        make_empty_layer(folder, site_dirs)
        run_pip(python, requirements)
        stamp.write_text(wanted)
    return python


def list_site_dirs() -> list[str]:
    """List the folders of packages of the environment that runs this code."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def make_empty_layer(folder: Path, site_dirs: list[str]) -> Path:
    """Make a layer without packages of its own over folders of packages; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path file is read after the layer's own packages, so those below come later.
    (packages / "below.pth").write_text("import site; " + "; ".join(f"site.addsitedir({p!r})" for p in site_dirs))
    return folder / "bin/python"


def make_environment(name: str, python: str, requirements: list[str]) -> Path:
    """Install packages into a complete environment `.venv-NAME` of another Python; return its Python.

    It is made again when the requirements have changed.

    Raises:
        OSError: pip failed; the message is the end of its output.
    """
    folder = REPO_ROOT / f".venv-{name}"
    wanted, stamp = "\n".join([python, str(folder), *requirements]), folder / "installed"
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
        run_pip(folder / "bin/python", ["setuptools", "wheel"])  # DeepSpeed is built from source, with torch
        run_pip(folder / "bin/python", [line for line in requirements if re.match("(torch|torchvision)\\b", line)])
        run_pip(folder / "bin/python", ["--no-build-isolation", *requirements])
        stamp.write_text(wanted)
    return folder / "bin/python"


def find_python(version: str) -> str | None:
    """Find a Python of a version such as 3.12, on PATH or among those of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [f"python{version}", *map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python")))]
    return next(filter(None, map(shutil.which, candidates)), None)


def run_pip(python: Path, arguments: list[str]) -> None:
    """Install packages into an environment.

    Raises:
        OSError: pip failed; the message is the end of its output.
    """
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--upgrade", *arguments]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise OSError("\n".join(done.stderr.splitlines()[-3:]))


def make_layer_or_skip(name: str, requirements: list[str]) -> Path:
    """Return the Python of an environment layer, or skip the test if it cannot be made."""
    try:
        return make_environment_layer(name, requirements)
    except OSError as error:
        pytest.skip(f"creating the environment {name} failed: {error}")


def layer_environment(python: Path, **variables: str) -> dict[str, str]:
    """Return the environment variables for a program in a layer.

    Commands of the layer come first, then those of the main environment. Compiled extensions are kept in the layer:
    another torch could not load them, or would wait for a lock of another kind.
    """
    command_dirs = [str(python.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    extensions_dir = str(python.parents[1] / "torch_extensions")
    return inherited | {"PATH": os.pathsep.join(command_dirs), "TORCH_EXTENSIONS_DIR": extensions_dir} | variables
