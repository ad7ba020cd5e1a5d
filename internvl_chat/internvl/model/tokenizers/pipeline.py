"""Check the files of a tokenizer of unknown origin.

A `tokenizer.json` is a pipeline: normalizer, pre-tokenizer, model, post-processor, decoder. Its steps may multiply a
text, or match it by a regular expression that takes exponential time. They are refused before the file is loaded. What
the `tokenizers` library itself does not accept shows at the latest in a trial.
"""

import base64
import binascii
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl.model.internvl_chat.safe_loading import MAX_NESTING, iterate_values, refuse_unsafe_configs
from internvl.model.slow_patterns import is_slow_pattern
from internvl.regular_files import MAX_JSON_BYTES, UnusableFileError, read_json_object

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# An id is an index of the embedding. The largest vocabulary of a published model has 262,400 entries.
MAX_TOKEN_ID = 2**22
# The steps of published tokenizers multiply the length of a text by at most 3 (Unicode normalization not counted).
MAX_GROWTH = 64
MAX_TEMPLATE_TOKENS, MAX_AFFIX_CHARACTERS, MAX_PADDING = 64, 64, 2**20
# Arguments of the tokenizer class in tokenizer_config.json that replace the vocabulary of the folder.
UNSUPPORTED_CONFIG_KEYS = ("vocab", "merges", "post_processor", "tokenizer_padding", "tokenizer_truncation")
TRIAL_TEXT = "<s> Hello, world! What's  this?\n\n12 345.6 \t(a_b) é 中文 ▁ \N{GRINNING FACE} " + "a" * 64 + " " * 64


def check_tokenizer_files(folder: Path) -> None:
    """Check that the files of a tokenizer are safe and readable."""
    refuse_unsafe_configs(folder)
    for path in folder.iterdir():
        if path.suffix in (".jinja", ".model", ".txt") and path.stat().st_size > MAX_JSON_BYTES:
            raise UnusableFileError(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_JSON_BYTES:,}")
    if (folder / CONFIG_FILE).is_file():
        check_tokenizer_config(read_json_object(folder / CONFIG_FILE), folder / CONFIG_FILE)
    if (folder / "added_tokens.json").is_file():
        file = folder / "added_tokens.json"
        _check_token_ids(read_json_object(file), file)
    if (folder / TOKENIZER_FILE).is_file():
        check_pipeline(read_json_object(folder / TOKENIZER_FILE), folder / TOKENIZER_FILE)


def check_tokenizer_config(config: dict, source: Path) -> None:
    """Raise a ValueError if a tokenizer_config.json has invalid or unsafe values."""
    for key in UNSUPPORTED_CONFIG_KEYS:
        if config.get(key) is not None:
            raise ValueError(f"{source}: {key} {config[key]!r:.80} is not supported; remove it.")
    name = config.get("tokenizer_class")
    if not isinstance(name, str | None):
        raise ValueError(f"{source}: tokenizer_class {name!r:.80} is invalid: expected a name.")
    tokens = config.get("added_tokens_decoder") or {}
    if not isinstance(tokens, dict) or not all(map(str.isdecimal, tokens)):
        raise ValueError(f"{source}: added_tokens_decoder {tokens!r:.80} is invalid: expected an object, id -> token.")
    for token_id, token in tokens.items():
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content:
            raise ValueError(f"{source}: added_tokens_decoder.{token_id} {token!r:.80} is invalid: it has no content.")
        _check_token_ids({content: int(token_id[:20])}, source)


def check_pipeline(pipeline: dict, source: Path) -> None:
    """Raise a ValueError if a tokenizer.json would exhaust memory or time.

    Args:
        pipeline: its content.
    """
    model, added_tokens = pipeline.get("model"), pipeline.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added_tokens, list):
        raise ValueError(f"{source} is invalid: expected an object `model` and a list `added_tokens`.")
    steps = {key: value for key, value in pipeline.items() if key not in ("model", "added_tokens")}
    for path, value in iterate_values(steps, source):
        if path.rpartition(".")[2] == "Regex" and (not isinstance(value, str) or is_slow_pattern(value)):
            raise ValueError(
                f"{source}: {path} {value!r:.80} is not supported: matching it may take very long, because of a "
                "repeated group of varying content or too many quantifiers."
            )
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        growth = math.prod(min(_get_growth(step), 1e9) for step in _find_steps(pipeline.get(key)))
        if growth > MAX_GROWTH:
            raise ValueError(
                f"{source}: {key} may multiply the length of a text by {growth:,.0f}; expected at most 64."
            )
    num_tokens = sum(_count_template_tokens(step) for step in _find_steps(pipeline.get("post_processor")))
    if num_tokens > MAX_TEMPLATE_TOKENS:
        raise ValueError(
            f"{source}: post_processor adds {num_tokens:,} tokens to a text; expected at most {MAX_TEMPLATE_TOKENS}."
        )
    for path, value in iterate_values({"padding": pipeline.get("padding")}, source):
        if type(value) in (int, float) and not 0 <= value <= MAX_PADDING:
            raise ValueError(f"{source}: {path} {value!r:.80} is invalid: expected at most {MAX_PADDING:,}.")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(model.get(key) or "")) > MAX_AFFIX_CHARACTERS:
            raise ValueError(f"{source}: model.{key} is longer than {MAX_AFFIX_CHARACTERS} characters.")
    if (prefix := model.get("continuing_subword_prefix")) and not _all_merges_continue(
        model.get("merges"), str(prefix)
    ):
        # tokenizers 0.23 cuts its bytes off in any case, also in the middle of a character, and may abort.
        raise ValueError(f"{source}: model.continuing_subword_prefix {prefix!r:.80} does not begin each merged piece.")
    if model.get("dropout"):
        raise ValueError(
            f"{source}: model.dropout {model['dropout']!r:.80} is not supported: a text would have other tokens in "
            "each epoch than were planned. Set it to null."
        )
    vocab = model.get("vocab")
    _check_token_ids(vocab if isinstance(vocab, dict) else {}, source)
    _check_token_ids({str(t.get("content")): t.get("id") for t in added_tokens if isinstance(t, dict)}, source)


def check_trial(tokenizer, source: str | Path) -> None:
    """Encode and decode a text; raise a ValueError if an id or their number is implausible.

    The library panics on some pipelines that it has loaded.
    """
    for text in ("", TRIAL_TEXT):
        ids = tokenizer(text).input_ids
        if len(ids) > MAX_GROWTH * len(TRIAL_TEXT):
            raise ValueError(f"{source} encodes {len(text)} characters as {len(ids):,} tokens.")
        tokenizer.decode(ids)
    _check_token_ids(tokenizer.get_vocab(), source)


def _all_merges_continue(merges: Any, prefix: str) -> bool:
    """Return whether the second piece of each merge begins with `prefix`."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges or []]
    return all(isinstance(pair, list) and str(pair[-1]).startswith(prefix) for pair in pairs)


def _check_token_ids(vocab: dict, source: str | Path) -> None:
    for token, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < MAX_TOKEN_ID:
            raise ValueError(
                f"{source}: the id {token_id!r:.80} of token {token!r:.80} is invalid: expected an integer from 0 to "
                f"{MAX_TOKEN_ID:,}."
            )


def _find_steps(step: Any, depth: int = 0) -> Iterator[dict]:
    """Yield the steps of a pipeline's stage, those inside sequences included."""
    if isinstance(step, list) and depth <= MAX_NESTING:
        for inner in step:
            yield from _find_steps(inner, depth + 1)
    elif isinstance(step, dict):
        yield step
        for inner in step.values():
            yield from _find_steps(inner if isinstance(inner, list) else None, depth + 1)


def _get_growth(step: dict) -> float:
    """Return by how much a step can multiply the length of a text at most."""
    if "precompiled_charsmap" in step:
        return _get_charsmap_growth(step["precompiled_charsmap"])
    content, pattern = str(step.get("content") or ""), step.get("pattern")
    if step.get("type") == "Prepend":
        return max(1.0, len(str(step.get("prepend"))) / 16)  # once per text
    if step.get("type") != "Replace" or not content:
        return 1.0
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    if replaced == "":
        return math.inf  # the library panics on some texts
    # A regular expression may match the empty text between any two characters.
    return max(1.0, len(content) / len(replaced)) if replaced else 1.0 + len(content)


def _get_charsmap_growth(charsmap: Any) -> float:
    """Return the length of the longest replacement in a map of sentencepiece.

    It begins with the bytes of a trie and their number (4 bytes); the replacements follow, each ended by a zero.
    """
    try:
        data = base64.b64decode(charsmap or "", validate=True)
    except (binascii.Error, TypeError, ValueError):
        return 1.0  # the library refuses it
    replacements = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return max(len(replacement) for replacement in replacements) / 3 or 1.0


def _count_template_tokens(step: dict) -> int:
    """Count the tokens that a step of the post-processor adds to a text."""
    special_tokens = step.get("special_tokens")
    num_ids = 0
    for token in special_tokens.values() if isinstance(special_tokens, dict) else ():
        ids = token.get("ids") if isinstance(token, dict) else None
        num_ids += len(ids) if isinstance(ids, list) else 1
    templates = [template for key in ("single", "pair") if isinstance(template := step.get(key), list)]
    return num_ids + sum(map(len, templates))
