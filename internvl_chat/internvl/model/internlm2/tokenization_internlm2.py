"""The InternLM2 tokenizer, implemented with the `tokenizers` library.

Published InternLM2 checkpoints hold a sentencepiece `tokenizer.model` and the Python code of a slow tokenizer. This
class gives the same ids and the same text from the same file without running that code. `load_tokenizer` selects it.
"""

import re
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from internvl.model.internlm2.configuration_internlm2 import InternLM2Config
from internvl.model.tokenizers.v4_compat import add_v4_config_fields

VOCAB_FILES_NAMES = {"vocab_file": "./tokenizer.model"}
# Upstream loads the tokenizer class from a file in the checkpoint. This entry is saved for upstream and ignored here.
AUTO_MAP = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
NORMAL_PIECE, USER_DEFINED_PIECE = 1, 4  # sentencepiece_model.proto, ModelProto.SentencePiece.Type
BPE_MODEL_TYPE = 2  # sentencepiece_model.proto, TrainerSpec.ModelType
# A text that is only the name of a byte piece ("<0x0A>") would be encoded as that byte. Split it after "<".
BYTE_PIECE_NAME = Regex(r"\A<(?=0x[0-9A-F]{2}>\z)")


class InternLM2Tokenizer(PreTrainedTokenizerFast):
    """BPE tokenizer with byte fallback.

    The ids of added tokens come from `added_tokens_decoder` or `added_tokens.json`.

    Args:
        decode_with_prefix_space: saved, but otherwise ignored.

    Raises:
        ValueError: `vocab_file` is not a sentencepiece BPE model with byte fallback and without normalization, or
            `sp_model_kwargs` is set.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]
    slow_tokenizer_class = None

    def __init__(
        self,
        vocab_file,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        sp_model_kwargs=None,
        add_bos_token=True,
        add_eos_token=False,
        decode_with_prefix_space=False,
        clean_up_tokenization_spaces=False,
        **kwargs,
    ):
        # `auto_map` names a code file in the checkpoint. Without it, `save_pretrained` does not copy that file.
        kwargs = {key: value for key, value in kwargs.items() if key not in ("auto_map", "tokenizer_file")}
        if sp_model_kwargs:
            raise ValueError(f"sp_model_kwargs {sp_model_kwargs} is not supported: expected none")
        new_names = {token_id: str(token) for token_id, token in kwargs.get("added_tokens_decoder", {}).items()}
        super().__init__(
            vocab_file=vocab_file,
            tokenizer_object=build_backend(vocab_file, new_names),
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            sp_model_kwargs=sp_model_kwargs,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            decode_with_prefix_space=decode_with_prefix_space,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **kwargs,
        )

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        """Return the arguments unchanged.

        transformers 5 would convert `vocab_file` here, without the user-defined pieces. `__init__` does it instead.
        """
        return kwargs

    def _decode(self, token_ids, skip_special_tokens=False, **_) -> str:
        """Decode ids, with spaces around added tokens.

        Runs of pieces of `tokenizer.model` are decoded by the backend.
        """
        token_ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        added_tokens = self.added_tokens_decoder
        special_ids = {token_id for token_id, token in added_tokens.items() if token.special}
        if skip_special_tokens:
            token_ids = [token_id for token_id in token_ids if token_id not in special_ids]
        texts = []
        for is_in_model, ids in groupby(token_ids, key=self.vocab_size.__gt__):
            run = list(ids)
            if is_in_model:
                texts.append(self._decode_run(run, special_ids))
            else:
                texts += [added_tokens[token_id].content for token_id in run if token_id in added_tokens]
        return " ".join(texts)

    def _decode_run(self, run: list[int], special_ids: set[int]) -> str:
        """Decode ids of pieces in `tokenizer.model`.

        As in the slow tokenizer, a space precedes each group of pieces that ends in special tokens.
        """
        text, pending = "", ""
        for is_special, ids in groupby(run, key=special_ids.__contains__):
            tokens = self.convert_ids_to_tokens(list(ids))
            if is_special:
                text, pending = f"{text} {pending}{''.join(tokens)}", ""
            else:
                pending = self.backend_tokenizer.decoder.decode(tokens)
        return text + pending

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        """Save `tokenizer.model` instead of `tokenizer.json`, for both classes to load."""
        fields = {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token, "auto_map": AUTO_MAP}
        add_v4_config_fields(self, file_names[0], tokenizer_class="InternLM2Tokenizer", **fields)
        return PreTrainedTokenizerBase._save_pretrained(self, save_directory, file_names, None, filename_prefix)


def import_sentencepiece_protobuf() -> Any:
    """Import the module with the protobuf classes of sentencepiece models.

    That of sentencepiece requires a protobuf as new as the one that built it (sentencepiece 0.2.3: 7.36), which other
    packages of an environment may not allow. transformers has a copy for protobuf >= 4.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception:  # ImportError, or protobuf's own VersionError
        from transformers.utils import sentencepiece_model_pb2_new as sentencepiece_model_pb2
    return sentencepiece_model_pb2


def build_backend(vocab_file: str, new_names: dict[int, str]) -> Tokenizer:
    """Build a `tokenizers` pipeline that equals the sentencepiece model.

    Args:
        new_names: id -> new name of pieces that the checkpoint renames.
    """
    model = import_sentencepiece_protobuf().ModelProto.FromString(Path(vocab_file).read_bytes())
    if model.trainer_spec.model_type != BPE_MODEL_TYPE or not model.trainer_spec.byte_fallback:
        raise ValueError(f"{vocab_file} is not supported: expected a BPE model with byte fallback")
    if model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces:
        raise ValueError(f"{vocab_file} is not supported: it normalizes text, unlike all published InternLM2 models")
    has_prefix = model.normalizer_spec.add_dummy_prefix  # "▁" before every text

    names = {p.piece: new_names.get(token_id, p.piece) for token_id, p in enumerate(model.pieces)}
    vocab = {name: token_id for token_id, name in enumerate(names.values())}
    # sentencepiece matches user-defined pieces before any merge. Here the pre-tokenizer isolates them, and
    # `ignore_merges` looks each of them up as one word.
    user_defined = {p.piece: names[p.piece] for p in model.pieces if p.type == USER_DEFINED_PIECE}
    alternatives = "|".join(re.escape(name) for name in sorted(user_defined.values(), key=len, reverse=True))

    backend = Tokenizer(BPE(vocab, _list_merges(model.pieces), byte_fallback=True, fuse_unk=True, ignore_merges=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * has_prefix
        + [normalizers.Replace(" ", "▁")]
        + [normalizers.Replace(old, new) for old, new in user_defined.items() if old != new]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(BYTE_PIECE_NAME, "isolated")]
        + [pre_tokenizers.Split(Regex(alternatives), "isolated")] * bool(user_defined)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * has_prefix
    )
    return backend


def _list_merges(pieces) -> list[tuple[str, str]]:
    """List all pairs that join to a piece, best score first."""
    scores = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL_PIECE}
    merges = []
    for piece, score in scores.items():
        splits = ((piece[:position], piece[position:]) for position in range(1, len(piece)))
        merges += [(-score, left, right) for left, right in splits if left in scores and right in scores]
    return [(left, right) for _, left, right in sorted(merges, key=lambda merge: merge[0])]


AutoTokenizer.register(InternLM2Config, fast_tokenizer_class=InternLM2Tokenizer, exist_ok=True)
