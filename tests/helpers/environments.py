"""Environments beside the main one, with other versions of some packages; made once, kept in `.venv-NAME`.

Each is a layer over the environment that runs this: what is installed in it comes first, everything else (torch above
all) is found below through a path file. So it costs seconds, and what the two have in common is the same file.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def layer(name: str, requirements: list[str]) -> Path:
    """The Python of `.venv-NAME`, in which pip has installed `requirements`; made or made anew if they changed.

    Raises:
        OSError: pip could not install them; its last words are the message.
    """
    folder = ROOT / f".venv-{name}"
    below = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    wanted = "\n".join([sys.version, str(folder), *below, *requirements])
    stamp, python = folder / "installed", folder / "bin/python"
    with open(ROOT / "requirements.txt") as lock:  # one installation at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "below.pth").write_text("import site; " + "; ".join(f"site.addsitedir({p!r})" for p in below))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--upgrade", *requirements]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise OSError("\n".join(done.stderr.splitlines()[-3:]))
        stamp.write_text(wanted)
    return python


def environ(python: Path, **more) -> dict[str, str]:
    """Variables for a program in that environment: its commands come first, then those of the main one.

    What is compiled there stays there: another torch could not load it, or would wait for a lock of another kind.
    """
    folders = [str(python.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own = {"PATH": os.pathsep.join(folders), "TORCH_EXTENSIONS_DIR": str(python.parents[1] / "torch_extensions")}
    return clean | own | more
