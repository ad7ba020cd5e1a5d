"""Loading the tokenizer of a checkpoint.

This package loads tokenizers by `load_tokenizer` only.
"""

import json
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import cached_file

from internvl.model.internlm2.tokenization_internlm2 import InternLM2Tokenizer
from internvl.model.internvl_chat.safe_loading import one_line_file_errors
from internvl.model.tokenizers.llama import LlamaTokenizer
from internvl.model.tokenizers.pipeline import check_tokenizer_files, check_trial
from internvl.model.tokenizers.v4_compat import Transformers4SavingMixin
from internvl.regular_files import read_json_object


class PreTrainedTokenizerFast(Transformers4SavingMixin, transformers.PreTrainedTokenizerFast):
    """Any tokenizer that a `tokenizer.json` defines."""


class Qwen2Tokenizer(Transformers4SavingMixin, transformers.Qwen2Tokenizer):
    """The tokenizer of Qwen2 and Qwen3.

    It loads `tokenizer.json`, or `vocab.json` and `merges.txt`.
    """

    # `from_pretrained` of transformers 5 looks at `cls.__dict__`: without an `__init__` there, it loads tokenizer.json
    # by other rules.
    __init__ = transformers.Qwen2Tokenizer.__init__

    def _save_slow_tokenizer_files(self, folder) -> list[str]:
        return self.backend_tokenizer.model.save(str(folder))


# `tokenizer_class` in tokenizer_config.json (also with the suffix "Fast") -> class.
TOKENIZER_CLASSES = {cls.__name__: cls for cls in (InternLM2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer)}
TOKENIZER_CLASSES["TokenizersBackend"] = PreTrainedTokenizerFast  # its name in transformers 5


def load_tokenizer(path: str | Path, **kwargs) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint without running code from it.

    A tokenizer without a token for padding pads with its end-of-text token. If it has none either, `get_pad_id` pads
    with 0. That must not be its padding token, which decoding leaves out: 0 is `!` in some vocabularies.

    Args:
        path: a folder, or ORG/NAME on the hub.
        kwargs: for `from_pretrained`.

    Returns:
        a fast tokenizer.

    Raises:
        ValueError: the folder or its tokenizer_config.json is missing, a file is damaged or unsafe, or only the
            checkpoint's code defines the class.
    """
    if not Path(path).is_dir() and str(path).count("/") != 1:
        raise ValueError(f"the checkpoint folder {str(path)!r} does not exist")
    with one_line_file_errors(path, f"the tokenizer in {str(path)!r}"):
        if Path(path).is_dir():
            check_tokenizer_files(Path(path))
        tokenizer = _load_by_class(path, get_tokenizer_config(path), **kwargs)
        check_trial(tokenizer, f"the tokenizer in {str(path)!r}")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


def _load_by_class(path: str | Path, config: dict, **kwargs) -> PreTrainedTokenizerBase:
    """Load a tokenizer with the class that its tokenizer_config.json names."""
    if not config:
        raise ValueError(f"no tokenizer in {str(path)!r}: tokenizer_config.json is missing")
    # The checkpoint's own files, whatever paths its configuration has: transformers 5.8 would open those.
    for key in config:
        if key.endswith("_file"):
            kwargs.setdefault(key, None)
    name = config.get("tokenizer_class") or ""
    tokenizer_class = TOKENIZER_CLASSES.get(name) or TOKENIZER_CLASSES.get(name.removesuffix("Fast"))
    if name.startswith(LlamaTokenizer.__name__) and config.get("legacy") is False and _has_sentencepiece_model(path):
        tokenizer_class = LlamaTokenizer
    elif name.startswith(LlamaTokenizer.__name__) and _is_byte_level(path):
        # Llama's class would split texts in its own way (transformers < 5.22), whatever tokenizer.json says.
        tokenizer_class = PreTrainedTokenizerFast
    if not tokenizer_class and "auto_map" in config and tokenizer_class_from_name(name) is None:
        raise ValueError(
            f"the tokenizer class {name} in {str(path)!r} is not supported: only Python code of the checkpoint defines "
            "it, and that code is not run. Save the tokenizer once as tokenizer.json with tokenizer_class "
            "PreTrainedTokenizerFast"
        )
    if tokenizer_class:
        return tokenizer_class.from_pretrained(path, **kwargs)
    # Given a configuration, AutoTokenizer does not read the chat model's, whose unknown type it would warn about.
    tokenizer = AutoTokenizer.from_pretrained(path, config=PretrainedConfig(), trust_remote_code=False, **kwargs)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if type(tokenizer) is transformers.PreTrainedTokenizerFast:
        # A class that does not fit its tokenizer.json. It would be saved under a name that transformers 4 lacks.
        return PreTrainedTokenizerFast.from_pretrained(path, **kwargs)
    return tokenizer


def _is_byte_level(path: str | Path) -> bool:
    """Return whether the pipeline in a checkpoint's tokenizer.json works on bytes."""
    file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    return bool(file) and "ByteLevel" in json.dumps(read_json_object(Path(file)).get("pre_tokenizer"))


def _has_sentencepiece_model(path: str | Path) -> bool:
    return cached_file(path, "tokenizer.model", _raise_exceptions_for_missing_entries=False) is not None
