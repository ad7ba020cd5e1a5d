"""The generation configuration of a chat model: `generation_config.json`."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import GenerationConfig
from transformers.utils import cached_file

from internvl.model.internvl_chat.safe_loading import one_line_file_errors
from internvl.model.lora import unwrap_peft
from internvl.regular_files import read_json_object

GENERATION_CONFIG_FILE = "generation_config.json"


def load_generation_config(path: str | Path) -> GenerationConfig | None:
    """Load the generation configuration of a checkpoint of unknown origin.

    Args:
        path: a folder, or ORG/NAME on the hub.

    Returns:
        None if there is none.

    Raises:
        ValueError, OSError: a value is invalid, or the file is not JSON.
    """
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(str(path), GENERATION_CONFIG_FILE, **optional)
    if file is None:
        return None
    # transformers makes an attribute of each key, which could replace a method.
    if methods := [key for key in read_json_object(file) if callable(getattr(GenerationConfig, key, None))]:
        raise ValueError(f"{file} is invalid: {methods[0]!r:.80} is not a setting of generation; remove it.")
    with one_line_file_errors(file):
        return GenerationConfig.from_pretrained(str(Path(file).parent))


def set_generation_config(model, path: str | Path) -> None:
    """Give a chat model and its LLM the generation configuration of a checkpoint, if there is one.

    Adapter checkpoints of earlier versions have one that was made of the LLM's configuration. It does not replace that
    of the base.
    """
    config = load_generation_config(path)
    if config and not (config._from_model_config and getattr(model, "generation_config", None)):
        unwrap_peft(model.language_model).generation_config = config
        # A copy: transformers' Trainer writes ids of the tokenizer into the model's.
        model.generation_config = copy.deepcopy(config)


def save_generation_config(model, folder: str | Path) -> None:
    """Save the generation configuration of a chat model's LLM.

    `GenerationConfig.save_pretrained` would refuse values that some published models have, such as a temperature
    without sampling.
    """
    unwrap_peft(model.language_model).generation_config.to_json_file(Path(folder) / GENERATION_CONFIG_FILE)


@contextmanager
def default_generation_config(model) -> Iterator[None]:
    """Generate without the sampling settings of `generation_config.json`.

    They are for engines: upstream's `chat` ignores them, too.
    """
    llm = unwrap_peft(model.language_model)
    saved = llm.generation_config
    llm.generation_config = GenerationConfig.from_model_config(llm.config)
    try:
        yield
    finally:
        llm.generation_config = saved
