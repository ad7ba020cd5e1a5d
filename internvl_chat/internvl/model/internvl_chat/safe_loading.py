"""Refusing checkpoints that could run code, before they are loaded.

Safetensors and JSON are data. But a checkpoint folder may also contain pickled weights, which are programs, and JSON
that makes transformers open files elsewhere or run code of the hub. `from_pretrained` calls `refuse_unsafe_files`
first.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ADAPTER_CONFIG_FILE = "adapter_config.json"


def refuse_unsafe_files(path: str | Path, allow_pickle: bool = False) -> None:
    """Raise a ValueError if loading the checkpoint folder could run code.

    Refused are:
    - weights that exist only as pickles (`pytorch_model*.bin`);
    - an index whose weight files are outside the folder or are not safetensors;
    - `transformers_weights` in `config.json`, if it is not a safetensors file;
    - attention or experts implementations in `config.json` that are code on the hub;
    - `adapter_config.json` beside `config.json`: transformers would load the adapter, also from a pickle.

    Args:
        path: a folder. Names of repositories on the hub pass unchecked.
        allow_pickle: accept `pytorch_model*.bin`. The caller must load only tensors from it (`weights_only`).
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if not allow_pickle:
        refuse_pickles(folder, "pytorch_model*.bin")
    for index_file in sorted(folder.glob("*.index.json")):
        suffix = ".bin" if allow_pickle and index_file.name.startswith("pytorch_model") else ".safetensors"
        for name in set(_read_json_object(index_file).get("weight_map", {}).values()):
            if Path(name).name != name or not name.endswith(suffix):
                raise ValueError(f"{index_file} is unsafe: it names the file {name!r}, expected *{suffix} beside it.")
    config_file = folder / "config.json"
    config = _read_json_object(config_file) if config_file.is_file() else {}
    weights_name = str(config.get("transformers_weights", ".safetensors"))
    if not weights_name.endswith(".safetensors"):
        raise ValueError(f"{config_file} is unsafe: it names the weights {weights_name!r}, expected *.safetensors.")
    for key, name in _find_hub_implementations(config):
        raise ValueError(f"{config_file} is unsafe: {key} {name!r} is code on the hub, which is not run; remove it")
    if config and (folder / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} is not supported: it has {ADAPTER_CONFIG_FILE} beside config.json. Adapters belong in a folder "
            "of the part they adapt, or in a folder without a model; move the file to load the model without them."
        )


def refuse_pickles(folder: Path, pattern: str = "*.bin") -> None:
    """Raise a ValueError if the only weights in a folder are pickles."""
    pickles = sorted(file.name for file in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"The weights in {folder} are pickled ({pickles[0]}), and opening a pickle can run code: convert them with "
            "tools/pickle2safetensors.py, or train with --allow_pickle True; both read nothing but tensors."
        )


@contextmanager
def one_line_checkpoint_errors(
    description: str, is_unrelated_fn: Callable[[Exception], bool] = lambda error: False
) -> Iterator[None]:
    """Turn a library's exceptions on damaged files into one-line errors.

    An exception of any type becomes a ValueError, except AssertionError, ValueError and OSError, which pass unchanged.

    Args:
        description: what is loaded, for the message.
        is_unrelated_fn: whether an error has another cause than the files, and passes unchanged.
    """
    try:
        yield
    except (AssertionError, ValueError, OSError):
        raise
    except Exception as error:
        if is_unrelated_fn(error):
            raise
        message = " ".join(str(error).split())
        raise ValueError(f"{description} cannot be loaded: {type(error).__name__}: {message}") from error


def _read_json_object(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is invalid: expected a JSON object, got a JSON {type(content).__name__}.")
    return content


def _find_hub_implementations(config: dict) -> Iterator[tuple[str, str]]:
    """Find keys such as `attn_implementation` that name hub repositories."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _find_hub_implementations(value)
        elif key.endswith("_implementation") and "/" in str(value):
            yield key, value
