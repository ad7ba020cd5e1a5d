"""The generation configuration of a chat model: `generation_config.json`."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig
from transformers.utils import cached_file

from internvl.model.internvl_chat.chat import build_conversation, get_end_marker
from internvl.model.internvl_chat.config_values import MAX_INT
from internvl.model.internvl_chat.safe_loading import one_line_file_errors
from internvl.model.lora import unwrap_peft
from internvl.regular_files import read_json_object

GENERATION_CONFIG_FILE = "generation_config.json"


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= MAX_INT


def _is_int_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_int, value))


class SettingType(NamedTuple):
    """Values that some settings accept, besides null."""

    is_valid_fn: Callable[[Any], bool]
    expected: str
    names: str


SETTING_TYPES = (
    SettingType(
        lambda value: _is_int(value) or _is_int_list(value),
        "an integer or a list of integers",
        "bos_token_id eos_token_id forced_eos_token_id",
    ),
    SettingType(_is_int_list, "a list of integers", "suppress_tokens begin_suppress_tokens"),
    SettingType(
        _is_int,
        "an integer",
        "pad_token_id decoder_start_token_id forced_bos_token_id max_length max_new_tokens min_length min_new_tokens "
        "num_beams num_beam_groups num_return_sequences no_repeat_ngram_size top_k",
    ),
    SettingType(
        lambda value: _is_int(value) or (isinstance(value, float) and math.isfinite(value)),
        "a number",
        "temperature top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty length_penalty "
        "diversity_penalty penalty_alpha guidance_scale max_time",
    ),
    SettingType(
        lambda value: isinstance(value, bool),
        "true or false",
        "do_sample use_cache renormalize_logits remove_invalid_values return_dict_in_generate output_attentions "
        "output_hidden_states output_scores output_logits",
    ),
)
TYPE_BY_SETTING = {name: setting_type for setting_type in SETTING_TYPES for name in setting_type.names.split()}


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
    content = read_json_object(file)
    # transformers makes an attribute of each key, which could replace a method.
    if methods := [key for key in content if callable(getattr(GenerationConfig, key, None))]:
        raise ValueError(f"{file} is invalid: {methods[0]!r:.80} is not a setting of generation; remove it.")
    for name, setting_type in TYPE_BY_SETTING.items():
        value = content.get(name)
        if value is not None and not setting_type.is_valid_fn(value):
            raise ValueError(
                f"{file} is invalid: {name} is {value!r:.80}, expected {setting_type.expected}; correct or remove it."
            )
    with one_line_file_errors(file):
        config = GenerationConfig.from_pretrained(str(Path(file).parent))
    # transformers drops unknown fields beside `_from_model_config`.
    for name in content.keys() - vars(config).keys():
        setattr(config, name, content[name])
    return config


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


def add_end_ids(folder: str | Path, tokenizer, config) -> None:
    """Add the ids that end an answer of `chat` to a result's `generation_config.json`.

    They are those of the template's end mark and of the tokenizer's end-of-text token. Engines and `generate` stop at
    the stored ids only. These stay first, in their order; if none is missing, the file stays as it is.

    Args:
        config: the chat model's; its `template` counts.
    """
    file, vocabulary = Path(folder) / GENERATION_CONFIG_FILE, tokenizer.get_vocab()
    content = read_json_object(file) if file.is_file() else {}
    stored = content.get("eos_token_id")
    ids = [] if stored is None else list(stored) if isinstance(stored, list) else [stored]
    num_stored = len(ids)
    for token in (get_end_marker(build_conversation(config)), tokenizer.eos_token):
        if token in vocabulary and vocabulary[token] not in ids:
            ids.append(vocabulary[token])
    if ids[num_stored:]:
        file.write_text(json.dumps(content | {"eos_token_id": ids}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
