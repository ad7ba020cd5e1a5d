"""Make environments with other versions of some packages, beside the main one.

Each is a layer over the environment that runs this code. What is installed in the layer comes first; everything else,
above all torch, is found in the main environment through a path file. So a layer takes seconds to make. It is kept in
`.venv-NAME`.
"""

import fcntl
import os
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
    site_dirs = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    wanted = "\n".join([sys.version, str(folder), *site_dirs, *requirements])
    stamp, python = folder / "installed", folder / "bin/python"
    with open(REPO_ROOT / "requirements.txt") as lock:  # one installation at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        # A path file is read after the layer's own packages, so those of the main environment come later.
        (packages / "below.pth").write_text("import site; " + "; ".join(f"site.addsitedir({p!r})" for p in site_dirs))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--upgrade", *requirements]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise OSError("\n".join(done.stderr.splitlines()[-3:]))
        stamp.write_text(wanted)
    return python


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
