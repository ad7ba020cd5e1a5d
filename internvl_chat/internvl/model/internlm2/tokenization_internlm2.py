"""The InternLM2 tokenizer: a sentencepiece `tokenizer.model` run by the `tokenizers` library.

Published InternLM2 checkpoints hold `tokenizer.model` and the Python code of a slow tokenizer. This class gives the
same ids and the same decoded text from the same file without running that code. `model/tokenizer.py` chooses it.
"""

import re
from itertools import groupby
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from internvl.model.internlm2.configuration_internlm2 import InternLM2Config
from internvl.model.tokenizers.v4_compat import complete_config

VOCAB_FILES_NAMES = {"vocab_file": "./tokenizer.model"}
# Where upstream looks for the class, in a file beside the saved ones; never followed here.
AUTO_MAP = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
NORMAL, USER_DEFINED = 1, 4  # types of pieces in a sentencepiece model
# Alone between two special tokens, the name of a byte piece would be taken for the byte: cut it behind its "<".
BYTE_NAME = Regex(r"\A<(?=0x[0-9A-F]{2}>\z)")


class InternLM2Tokenizer(PreTrainedTokenizerFast):
    """Byte-fallback BPE of InternLM2. Ids of the added tokens come from `added_tokens_decoder` or `added_tokens.json`.

    `decode_with_prefix_space` is read and saved only: the text of ids does not depend on it.

    Raises:
        ValueError: `vocab_file` is no sentencepiece BPE with byte fallback and identity normalisation, or
            `sp_model_kwargs` asks for something else.
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
        # The file of code that `auto_map` names is never run, nor copied by `save_pretrained`.
        kwargs = {key: value for key, value in kwargs.items() if key not in ("auto_map", "tokenizer_file")}
        if sp_model_kwargs:
            raise ValueError(f"sp_model_kwargs {sp_model_kwargs}: options of sentencepiece cannot be set here")
        overlay = {index: str(token) for index, token in kwargs.get("added_tokens_decoder", {}).items()}
        super().__init__(
            vocab_file=vocab_file,
            tokenizer_object=build_backend(vocab_file, overlay),
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
        """Leave `vocab_file` to the constructor; the library's own conversion would ignore the user-defined pieces."""
        return kwargs

    def _decode(self, token_ids, skip_special_tokens=False, **_) -> str:
        token_ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        added = self.added_tokens_decoder
        special = {index for index, token in added.items() if token.special}
        if skip_special_tokens:
            token_ids = [index for index in token_ids if index not in special]
        parts = []
        for in_model, ids in groupby(token_ids, key=self.vocab_size.__gt__):
            run = list(ids)
            parts += [self._decode_run(run, special)] if in_model else [added[i].content for i in run if i in added]
        return " ".join(parts)

    def _decode_run(self, run, special) -> str:
        """Text of ids inside the model file; as in the original, what ends in a special token gets a space in front."""
        text, pending = "", ""
        for is_special, ids in groupby(run, key=special.__contains__):
            tokens = self.convert_ids_to_tokens(list(ids))
            if is_special:
                text, pending = f"{text} {pending}{''.join(tokens)}", ""
            else:
                pending = self.backend_tokenizer.decoder.decode(tokens)
        return text + pending

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        """Save as the original does (`tokenizer.model`, not `tokenizer.json`), so that either class can load it."""
        fields = {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token, "auto_map": AUTO_MAP}
        complete_config(self, file_names[0], tokenizer_class="InternLM2Tokenizer", **fields)
        return PreTrainedTokenizerBase._save_pretrained(self, save_directory, file_names, None, filename_prefix)


def build_backend(vocab_file: str, overlay: dict[int, str]) -> Tokenizer:
    """The sentencepiece model as a `tokenizers` pipeline; `overlay` renames pieces (id -> new name)."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(Path(vocab_file).read_bytes())
    if model.trainer_spec.model_type != 2 or not model.trainer_spec.byte_fallback:
        raise ValueError(f"{vocab_file} is not a BPE model with byte fallback")
    if model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces:
        raise ValueError(f"{vocab_file} normalises its input, which no published InternLM2 model does")
    prefix = model.normalizer_spec.add_dummy_prefix

    renamed = {p.piece: overlay.get(index, p.piece) for index, p in enumerate(model.pieces)}
    vocab = {name: index for index, name in enumerate(renamed.values())}
    # A user-defined piece is found before any merge and stays whole: isolated first, then looked up as a word.
    atoms = {p.piece: renamed[p.piece] for p in model.pieces if p.type == USER_DEFINED}
    alternatives = "|".join(re.escape(name) for name in sorted(atoms.values(), key=len, reverse=True))

    backend = Tokenizer(BPE(vocab, _merges(model.pieces), byte_fallback=True, fuse_unk=True, ignore_merges=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * prefix
        + [normalizers.Replace(" ", "▁")]
        + [normalizers.Replace(old, new) for old, new in atoms.items() if old != new]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(BYTE_NAME, "isolated")]
        + [pre_tokenizers.Split(Regex(alternatives), "isolated")] * bool(atoms)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * prefix
    )
    return backend


def _merges(pieces) -> list[tuple[str, str]]:
    """All ways to join two pieces into a third, best score first."""
    scores = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    merges = []
    for piece, score in scores.items():
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(-score, left, right) for left, right in cuts if left in scores and right in scores]
    return [(left, right) for _, left, right in sorted(merges, key=lambda merge: merge[0])]


AutoTokenizer.register(InternLM2Config, fast_tokenizer_class=InternLM2Tokenizer, exist_ok=True)
