"""Error reporting, input checkpoints and output folders of the command-line tools."""

import functools
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHAT_MODEL_TYPE = "internvl_chat"  # `model_type` in the config.json of a chat checkpoint


def exit_on_user_error(main_fn: Callable) -> Callable:
    """Decorate `main(argv=None)` to report user errors in one line.

    A ValueError or OSError ends the program with `error: ...` and exit status 1. INTERNVL_TRACEBACK=1 shows the
    traceback instead. Notices of libraries that no user can act on are not printed.
    """

    @functools.wraps(main_fn)
    def wrapper(argv: list[str] | None = None):
        _silence_libraries()
        try:
            return main_fn(argv)
        except (ValueError, OSError) as error:
            if os.environ.get("INTERNVL_TRACEBACK") == "1":
                raise
            sys.exit(f"error: {error}")

    return wrapper


def _silence_libraries() -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about one another
    # transformers imports DeepSpeed to save a model. Without this variable, DeepSpeed 0.19 warns on a machine without a
    # GPU. A program that has not imported torch imports no DeepSpeed either.
    torch = sys.modules.get("torch")
    if torch and not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def require_checkpoint_dir(path: str | Path, model_type: str | None = None) -> Path:
    """Return `path` if it is a checkpoint folder of this model type.

    Args:
        model_type: required `model_type` of its `config.json`; None accepts any.

    Raises:
        ValueError: `config.json` is missing, or has another `model_type`.
    """
    config_path = Path(path) / "config.json"
    if not config_path.is_file():
        raise ValueError(f"no checkpoint in {str(path)!r}: config.json is missing")
    actual_type = json.loads(config_path.read_text(encoding="utf-8")).get("model_type")
    if model_type not in (None, actual_type):
        raise ValueError(f"the checkpoint in {str(path)!r} has model_type {actual_type!r}, expected {model_type!r}")
    return Path(path)


@contextmanager
def create_output_dir(path: str | Path) -> Iterator[Path]:
    """Create an empty output folder; remove it if the body fails.

    Raises:
        ValueError: `path` is a file or a folder that is not empty.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"the output folder {path} is a file")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"the output folder {path} is not empty: choose another one or empty it first")
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except BaseException:
        shutil.rmtree(path)
        raise
