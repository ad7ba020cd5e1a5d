"""What a checkpoint of a stranger could make transformers open or run, refused before anything of it is loaded.

Safetensors and JSON hold data. What else may lie in a folder: weights as pickles, which are programs; names of files
elsewhere; names of code on a hub. Beside `from_pretrained`, which asks here first.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"


def refuse_unsafe_files(path: str | Path, allow_pickle: bool = False) -> None:
    """Raises a ValueError if the checkpoint folder `path` holds what is not opened; the hub's own names pass.

    Args:
        allow_pickle: weights may be `pytorch_model*.bin`, of which tensors alone are read.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if not allow_pickle:
        refuse_pickles(folder, "pytorch_model*.bin")
    for index in sorted(folder.glob("*.index.json")):
        ending = ".bin" if allow_pickle and index.name.startswith("pytorch_model") else ".safetensors"
        for name in set(_read(index).get("weight_map", {}).values()):
            if Path(name).name != name or not name.endswith(ending):
                raise ValueError(f"{index} names the file {name!r}, which is no *{ending} beside it: it is not opened")
    config = _read(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not str(named := config.get("transformers_weights", ending := ".safetensors")).endswith(ending):
        raise ValueError(f"{folder}/config.json names the weights {named!r}, which are no safetensors: not opened")
    for key, name in _implementations(config):
        raise ValueError(f"{folder}/config.json says {key} {name!r}: code of a hub, which is not run; remove the key")
    if config and (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{folder} holds {ADAPTER_CONFIG} beside config.json: adapters lie in a folder of the part they adapt, or "
            "alone in one; move it away to load the model without them"
        )


def refuse_pickles(folder: Path, pattern: str = "*.bin") -> None:
    """ValueError if all that a folder has of weights are pickles."""
    found = sorted(file.name for file in folder.glob(pattern))
    if found and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"the weights in {folder} are pickled ({found[0]}), and opening a pickle can run code: rewrite them with "
            "tools/pickle2safetensors.py, or train with --allow_pickle True; both read nothing but tensors"
        )


@contextmanager
def one_line_checkpoint_errors(what: str, passing: Callable[[Exception], bool] = lambda error: False) -> Iterator[None]:
    """What libraries raise when files are wrong, which may be anything, as a ValueError of one sentence on `what`; but
    for errors that files are not to blame for, which are `passing`."""
    try:
        yield
    except (AssertionError, ValueError, OSError):
        raise
    except Exception as error:
        if passing(error):
            raise
        said = " ".join(str(error).split())
        raise ValueError(f"{what} cannot be loaded: {type(error).__name__}: {said}") from error


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, not an object")
    return content


def _implementations(config: dict) -> Iterator[tuple[str, str]]:
    """Keys that choose what computes attention or experts, where they name a repository of a hub."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _implementations(value)
        elif key.endswith("_implementation") and "/" in str(value):
            yield key, value
