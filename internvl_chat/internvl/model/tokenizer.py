"""Which tokenizer a checkpoint holds; the one way in which this package loads any."""

from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .internlm2.tokenization_internlm2 import InternLM2Tokenizer


def load_tokenizer(path: str | Path, **kwargs) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a hub's ORG/NAME, always a fast one; code that lies there is not run.

    Raises:
        ValueError: there is no such folder, or no tokenizer_config.json in it.
    """
    if not Path(path).is_dir() and str(path).count("/") > 1:
        raise ValueError(f"there is no checkpoint folder {str(path)!r}")
    config = get_tokenizer_config(path)
    if not config:
        raise ValueError(f"no tokenizer in {str(path)!r}: tokenizer_config.json is missing there")
    if (config.get("tokenizer_class") or "").removesuffix("Fast") == InternLM2Tokenizer.__name__:
        return InternLM2Tokenizer.from_pretrained(path, **kwargs)
    # The chat model's configuration would tell AutoTokenizer nothing, and it would warn that it does not know it.
    return AutoTokenizer.from_pretrained(path, config=PretrainedConfig(), trust_remote_code=False, **kwargs)
