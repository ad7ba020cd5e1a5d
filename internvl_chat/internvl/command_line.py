"""Messages, input checkpoints and output folders of the command-line tools."""

import functools
import io
import logging
import os
import select
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from internvl.regular_files import read_json_object

INPUT_FLAGS = ("model_name_or_path", "vision_path", "llm_path", "mlp_path", "meta_path")
CHAT_MODEL_TYPE = "internvl_chat"  # `model_type` in the config.json of a chat checkpoint


def exit_on_user_error(main_fn: Callable) -> Callable:
    """Decorate `main(argv=None)` to report user errors in one line.

    A ValueError or OSError ends the program with `error: ...` and exit status 1. INTERNVL_TRACEBACK=1 shows the
    traceback instead. A reader of stdout that leaves, such as `head`, ends it silently. Notices of libraries that no
    user can act on are not printed.
    """

    @functools.wraps(main_fn)
    def wrapper(argv: list[str] | None = None):
        _silence_libraries()
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may have bytes that the terminal cannot show
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            status = main_fn(argv)
            if sys.stdout:  # None: closed by the shell
                sys.stdout.flush()
            return status
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError) and _is_without_reader(sys.stdout):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
                sys.exit(128 + signal.SIGPIPE)
            if os.environ.get("INTERNVL_TRACEBACK") == "1":
                raise
            sys.exit(f"error: {error}")

    return wrapper


def _is_without_reader(stream: TextIO) -> bool:
    """Return whether a stream is a pipe whose reader has left."""
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _silence_libraries() -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about one another
    # transformers imports DeepSpeed to save a model. Without this variable, DeepSpeed 0.19 warns on a machine without a
    # GPU. A program that has not imported torch imports no DeepSpeed either.
    torch = sys.modules.get("torch")
    if torch and not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def log_to_console(level: int = logging.WARNING) -> None:
    """Log this package from a level on, and libraries only at error level."""
    console = logging.StreamHandler()
    console.addFilter(lambda record: record.name.startswith("internvl") or record.levelno >= logging.ERROR)
    logging.basicConfig(format="%(levelname)s %(message)s", level=level, handlers=[console])


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
    actual_type = read_json_object(config_path).get("model_type")
    if model_type not in (None, actual_type):
        raise ValueError(f"the checkpoint in {str(path)!r} has model_type {actual_type!r}, expected {model_type!r}")
    return Path(path)


def refuse_inputs_in_output_dir(output_dir: str | Path, inputs: Mapping[str, str | None]) -> None:
    """Raise a ValueError if a run could overwrite its inputs.

    Inputs may not be the output folder or inside it, and it may not be inside a checkpoint. Symbolic links and mounts
    are followed.

    Args:
        inputs: name for the message -> path. Paths that do not exist, such as hub names, are ignored.
    """
    folder = Path(os.path.realpath(output_dir))
    for name, value in inputs.items():
        if not value or not os.path.exists(value):
            continue
        path = Path(os.path.realpath(value))
        if folder.exists() and any(map(folder.samefile, [path, *path.parents])):
            relation = "is" if folder.samefile(path) else "contains"
            raise ValueError(
                f"--output_dir {output_dir} {relation} {name} {value}, which the run could overwrite: choose another "
                "folder."
            )
        is_inside = any(path.samefile(parent) for parent in folder.parents if parent.exists())
        if is_inside and (path / "config.json").is_file():
            raise ValueError(f"--output_dir {output_dir} is inside of {name} {value}: choose another folder.")


def list_run_inputs(args: Mapping[str, Any]) -> dict[str, str | None]:
    """List the files and folders that a run reads, for `refuse_inputs_in_output_dir`.

    Args:
        args: values of the flags INPUT_FLAGS. Files that are invalid are reported elsewhere.
    """
    inputs = {f"--{flag}": args.get(flag) for flag in INPUT_FLAGS}
    base = _read_json(Path(args.get("model_name_or_path") or "", "config.json")).get("base_model")
    inputs["the base model"] = base.get("path") if isinstance(base, dict) else None
    for name, dataset in _read_json(Path(args.get("meta_path") or "")).items():
        if isinstance(dataset, dict):
            inputs |= {f"{key} of dataset {name}": dataset.get(key) for key in ("root", "annotation")}
    return {name: value for name, value in inputs.items() if isinstance(value, str)}


def _read_json(path: Path) -> dict:
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        return {}


def resolve_below(folder: str | Path, path: object) -> Path:
    """Join a path from an untrusted file to a folder, with links resolved.

    Raises:
        ValueError: it is no path, or leads out of the folder.
    """
    if not isinstance(path, str) or not path.isprintable():
        raise ValueError(f"{path!r:.80} is not a path: expected a text")
    joined = (Path(folder) / path).resolve()
    if not joined.is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{path!r:.80} leads out of the folder {folder}, which is not allowed")
    return joined


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
