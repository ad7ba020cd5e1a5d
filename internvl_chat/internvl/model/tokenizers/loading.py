"""Which tokenizer a checkpoint holds; the one way in which this package loads any."""

from pathlib import Path

import transformers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import cached_file

from internvl.model.internlm2.tokenization_internlm2 import InternLM2Tokenizer
from internvl.model.internvl_chat.safe_loading import one_line_checkpoint_errors
from internvl.model.tokenizers.llama import LlamaTokenizer
from internvl.model.tokenizers.v4_compat import SavedForTransformers4


class PreTrainedTokenizerFast(SavedForTransformers4, transformers.PreTrainedTokenizerFast):
    """Whatever `tokenizer.json` says."""


class Qwen2Tokenizer(SavedForTransformers4, transformers.Qwen2Tokenizer):
    """Qwen2's and Qwen3's, from `vocab.json` and `merges.txt` or from `tokenizer.json`."""

    __init__ = transformers.Qwen2Tokenizer.__init__  # a class without an own one the library builds by other rules

    def _save_slow_files(self, folder) -> list[str]:
        return self.backend_tokenizer.model.save(str(folder))


OWN = {cls.__name__: cls for cls in (InternLM2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer)}
OWN["TokenizersBackend"] = PreTrainedTokenizerFast  # as transformers 5 calls it


def load_tokenizer(path: str | Path, **kwargs) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a hub's ORG/NAME, always a fast one; code that lies there is not run.

    Raises:
        ValueError: there is no such folder, no tokenizer_config.json in it, or a class that only code in it defines.
    """
    if not Path(path).is_dir() and str(path).count("/") > 1:
        raise ValueError(f"there is no checkpoint folder {str(path)!r}")
    with one_line_checkpoint_errors(f"the tokenizer in {str(path)!r}"):
        return _load(path, get_tokenizer_config(path), **kwargs)


def _load(path: str | Path, config: dict, **kwargs) -> PreTrainedTokenizerBase:
    if not config:
        raise ValueError(f"no tokenizer in {str(path)!r}: tokenizer_config.json is missing there")
    name = config.get("tokenizer_class") or ""
    own = OWN.get(name) or OWN.get(name.removesuffix("Fast"))
    if name.startswith(LlamaTokenizer.__name__) and config.get("legacy") is False and _has_sentencepiece(path):
        own = LlamaTokenizer
    if not own and "auto_map" in config and tokenizer_class_from_name(name) is None:
        raise ValueError(
            f"the tokenizer of {str(path)!r} is of class {name}, which only Python code of the checkpoint defines, and "
            "that is not run: save the tokenizer once as tokenizer.json with tokenizer_class PreTrainedTokenizerFast"
        )
    if own:
        return own.from_pretrained(path, **kwargs)
    # The chat model's configuration would tell AutoTokenizer nothing, and it would warn that it does not know it.
    return AutoTokenizer.from_pretrained(path, config=PretrainedConfig(), trust_remote_code=False, **kwargs)


def _has_sentencepiece(path: str | Path) -> bool:
    return cached_file(path, "tokenizer.model", _raise_exceptions_for_missing_entries=False) is not None
