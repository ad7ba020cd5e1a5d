"""Which tokenizer a checkpoint folder holds; the one way in which this package loads any."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .internlm2.tokenization_internlm2 import InternLM2Tokenizer


def load_tokenizer(path: str | Path, **kwargs) -> PreTrainedTokenizerBase:
    """The tokenizer of folder `path`, always a fast one; code that lies in the folder is not run.

    Raises:
        ValueError: there is no such folder, or it has no tokenizer_config.json.
    """
    config_file = Path(path) / "tokenizer_config.json"
    if not config_file.is_file():
        raise ValueError(f"no tokenizer in {str(path)!r}: {config_file.name} is missing there")
    name = json.loads(config_file.read_text(encoding="utf-8")).get("tokenizer_class") or ""
    if name.removesuffix("Fast") == InternLM2Tokenizer.__name__:
        return InternLM2Tokenizer.from_pretrained(path, **kwargs)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **kwargs)
