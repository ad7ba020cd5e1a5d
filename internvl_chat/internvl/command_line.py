"""What the tools' command lines share: one sentence for the user's mistakes, folders read and folders written."""

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHAT = "internvl_chat"  # the chat model's `model_type`


def command(main: Callable) -> Callable:
    """Decorates `main(argv=None)`: what the user did wrong ends the program with one sentence and status 1.

    INTERNVL_TRACEBACK=1 shows where it came from.
    """

    @functools.wraps(main)
    def checked(argv: list[str] | None = None):
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            if os.environ.get("INTERNVL_TRACEBACK") == "1":
                raise
            sys.exit(f"error: {error}")

    return checked


def checkpoint_folder(path: str | Path, model_type: str | None = None) -> Path:
    """A folder that holds a checkpoint (of this type); ValueError if it does not."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"no checkpoint in {str(path)!r}: config.json is missing there")
    found = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    if model_type not in (None, found):
        raise ValueError(f"the checkpoint in {str(path)!r} is of type {found!r}, not {model_type!r}")
    return Path(path)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into, which does not outlive a failure; ValueError if anything lies in it."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"the output folder {path} is a file")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"the output folder {path} is not empty: name another, or remove what lies in it")
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except BaseException:
        shutil.rmtree(path)
        raise
