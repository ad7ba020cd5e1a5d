"""Refusing model folders that could run code, before they are loaded.

Safetensors and JSON are data. But a model folder may also contain pickled weights, which are programs, and JSON that
makes a library open files elsewhere or run code of the hub. `from_pretrained` and `load_tokenizer` call the functions
here first. `config_values.py` checks the sizes in a configuration, `weight_shapes.py` compares them with the weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from internvl.regular_files import read_json_object, require_regular_files

ADAPTER_CONFIG_FILE = "adapter_config.json"
# JSON files that a library reads, besides `tokenizer.json` (see `tokenizers/pipeline.py`) and `*.index.json`.
CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    ADAPTER_CONFIG_FILE,
)
# Folders below a model folder with files that a library reads.
SUBFOLDERS = ("additional_chat_templates", "vision_model", "mlp1", "language_model")
MAX_CONFIG_BYTES, MAX_NESTING = 2**24, 32
MAX_MESSAGE_CHARACTERS = 2000
# Keys with which transformers opens other files, or replaces its own classes, and that no published model has.
UNSUPPORTED_KEYS = {
    "configuration_files",
    "fast_tokenizer_files",
    "gguf_file",
    "init_inputs",
    "tokenizer_object",
    "fusion_config",
    "distributed_config",
    "use_kernels",
    "attribute_map",
    "sub_configs",
}
# Other quantization methods import packages by name, fetch kernels from the hub or need pickles.
QUANTIZATION_METHODS = ("bitsandbytes",)


def refuse_unsafe_files(path: str | Path, allow_pickle: bool = False) -> None:
    """Raise a ValueError if loading the model folder could run code.

    Refused are:
    - a FIFO or device, which a library would wait for, and a pointer of Git LFS;
    - values in a configuration that `refuse_unsafe_values` does not accept;
    - weights that exist only as pickles (`pytorch_model*.bin`);
    - an index whose weight files are absent, outside the folder or not safetensors;
    - `transformers_weights` in `config.json`, if it is not a safetensors file;
    - `adapter_config.json` beside `config.json`: transformers would load the adapter, also from a pickle.

    Args:
        path: a folder. Names of repositories on the hub pass unchecked.
        allow_pickle: accept `pytorch_model*.bin`. The caller must load only tensors from it (`weights_only`).
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    refuse_unsafe_configs(folder)
    if not allow_pickle:
        refuse_pickles(folder, "pytorch_model*.bin")
    for index_file in sorted(folder.glob("*.index.json")):
        is_pickle_index = index_file.name.startswith("pytorch_model")
        if is_pickle_index and not allow_pickle:
            continue  # nothing reads it
        weight_map = read_json_object(index_file).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index_file} is invalid: expected an object `weight_map`, got {weight_map!r:.80}.")
        suffix = ".bin" if is_pickle_index else ".safetensors"
        for name in sorted({str(name) for name in weight_map.values()}):
            if Path(name).name != name or not name.endswith(suffix):
                raise ValueError(
                    f"{index_file} is unsafe: it names the file {name!r:.80}, expected *{suffix} beside it."
                )
            if not (folder / name).exists() and not (folder / "model.safetensors").exists():
                raise ValueError(f"{index_file} names {name}, which is missing: download the folder again.")
    config_file = folder / "config.json"
    config = read_json_object(config_file) if config_file.is_file() else {}
    weights_name = str(config.get("transformers_weights", ".safetensors"))
    if not weights_name.endswith(".safetensors") or "/" in weights_name:
        raise ValueError(f"{config_file} is unsafe: it names the weights {weights_name!r:.80}, expected *.safetensors.")
    if config and (folder / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} is not supported: it has {ADAPTER_CONFIG_FILE} beside config.json. Adapters belong in a folder "
            "of the part they adapt, or in a folder without a model; move the file to load the model without them."
        )


def refuse_unsafe_configs(folder: Path) -> None:
    """Raise a ValueError if a configuration file in the folder is unsafe or unreadable."""
    for subfolder in (folder, *(folder / name for name in SUBFOLDERS)):
        if not subfolder.is_dir():
            continue
        require_regular_files(subfolder)
        for file in (subfolder / name for name in CONFIG_FILES):
            if file.is_file():
                refuse_unsafe_values(read_json_object(file, MAX_CONFIG_BYTES), file)


def refuse_unsafe_values(content: Any, source: str | Path) -> None:
    """Raise a ValueError if a value in a configuration is unsafe, at any depth.

    Args:
        content: parsed JSON.
        source: the file, for the message.
    """
    for path, value in iterate_values(content, source):
        if reason := path and _find_unsafe_reason(path.rpartition(".")[2], value):
            raise ValueError(f"{source} is unsafe: {path} {value!r:.80} {reason}; remove it.")


def iterate_values(content: Any, source: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield key path (`llm_config.rope_scaling.factor`) and value of each part.

    Raises:
        ValueError: it is nested deeper than `MAX_NESTING`, which libraries would follow by recursion.
    """
    todo: list[tuple[int, str, Any]] = [(0, "", content)]
    while todo:
        depth, path, value = todo.pop()
        if depth > MAX_NESTING:
            raise ValueError(f"{source} is invalid: its values are nested deeper than {MAX_NESTING} levels.")
        yield path, value
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        todo += [(depth + 1, f"{path}.{key}".lstrip("."), child) for key, child in items]


def _find_unsafe_reason(key: str, value: Any) -> str | None:
    """Return why a value of a configuration is not accepted, or None."""
    # `attn_implementation`, `_experts_implementation`, `kernel_config`, ...: a string, or a dict with one per part.
    if ("implementation" in key or "kernel" in key) and any("/" in text for text in _find_strings(value)):
        return "is code on the hub, which is not run"
    if key in UNSUPPORTED_KEYS and value:
        return "is not supported"
    if key == "quantization_config" and value is not None:
        method = value.get("quant_method") if isinstance(value, dict) else value
        if method not in QUANTIZATION_METHODS:
            return f"is not supported: expected the quant_method {' or '.join(QUANTIZATION_METHODS)}"
    return None


def _find_strings(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, keys of objects included."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, list):
            todo += value


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
    description: str, is_unrelated_fn: Callable[[BaseException], bool] = lambda error: False
) -> Iterator[None]:
    """Turn a library's exceptions on damaged files into one-line errors.

    An exception of any type becomes a ValueError. AssertionError, OSError, UnpicklingError and a ValueError of one line
    pass unchanged. A panic of the `tokenizers` library, which is no `Exception`, becomes one, too.

    Args:
        description: what is loaded, for the message.
        is_unrelated_fn: whether an error has another cause than the files, and passes unchanged.
    """
    try:
        yield
    except (AssertionError, OSError, UnpicklingError):  # the last has its own message, see `weights_only_loading`
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # pyo3 exports the class under no name
        is_one_line = isinstance(error, ValueError) and "\n" not in str(error)
        if is_one_line or is_unrelated_fn(error) or not (is_panic or isinstance(error, Exception)):
            raise
        message = " ".join(str(error).split())[:MAX_MESSAGE_CHARACTERS]
        message = "not enough memory" if isinstance(error, MemoryError) else message
        raise ValueError(f"{description} cannot be loaded: {type(error).__name__}: {message}") from error


@contextmanager
def one_line_file_errors(path: str | Path, description: str = "") -> Iterator[None]:
    """Turn errors on an untrusted file into one-line errors that name it.

    Args:
        description: for the message, instead of the path alone.
    """
    description = description or str(path)
    try:
        with one_line_checkpoint_errors(description):
            yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{description} is invalid: {str(error)[:MAX_MESSAGE_CHARACTERS]}") from error
