"""Llama's tokenizer for checkpoints with a sentencepiece `tokenizer.model`.

InternVL2-4B, whose LLM is Phi-3, has one. Such models were trained with the slow tokenizer class of transformers 4,
which transformers 5 no longer has. The fast class of transformers 5 splits texts in the same way. But it puts no "▁"
before a text that starts with a space or a marker of the chat template, and decodes added tokens differently. The class
here gives the ids and texts of the slow one; `load_tokenizer` selects it.
"""

from itertools import chain, groupby

import transformers
from tokenizers import decoders, pre_tokenizers

from internvl.model.tokenizers.v4_compat import Transformers4SavingMixin


class LlamaTokenizer(Transformers4SavingMixin, transformers.LlamaTokenizer):
    """The slow Llama tokenizer with `legacy: false`.

    It puts one "▁" before a text, none after a marker of the chat template. `offset_mapping` refers to the given text;
    `char_to_token` and the like count the "▁" as a character.
    """

    def __init__(self, *args, **kwargs):
        # transformers 5 sets it to the control pieces. The checkpoint's own list is in `extra_special_tokens`.
        kwargs.pop("additional_special_tokens", None)
        super().__init__(*args, **kwargs)
        self.init_kwargs["legacy"] = self.legacy  # `save_pretrained` saves `init_kwargs`
        backend = self.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])

    def _encode_plus(self, text, text_pair=None, is_split_into_words=False, **kwargs):
        """Encode texts with "▁" before each that starts with no special token."""
        if is_split_into_words or text_pair is not None:
            raise ValueError("this tokenizer supports single texts only, neither words nor pairs")
        texts = [text] if isinstance(text, str) else text
        special_tokens = tuple(self.all_special_tokens)
        prefixes = ["" if not t or t.startswith(special_tokens) else "▁" for t in texts]
        prefixed = [prefix + t for prefix, t in zip(prefixes, texts, strict=True)]
        encoded = super()._encode_plus(prefixed[0] if isinstance(text, str) else prefixed, **kwargs)
        if "offset_mapping" in encoded:
            # Per text (start, end) of its tokens in the prefixed text; the prefix itself becomes (0, 0).
            rows = [encoded["offset_mapping"]] if isinstance(text, str) else encoded["offset_mapping"]
            shifted = [
                [(max(start - len(prefix), 0), max(end - len(prefix), 0)) for start, end in row]
                for prefix, row in zip(prefixes, rows, strict=True)
            ]
            encoded["offset_mapping"] = shifted[0] if isinstance(text, str) else shifted
        return encoded

    def _decode(self, token_ids, skip_special_tokens=False, **_) -> str:
        """Decode ids, with spaces around added tokens.

        `skip_special_tokens` skips bos, eos, unk, pad and the listed special tokens, but no other added token.
        """
        token_ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        special_tokens = set(self.all_special_tokens)
        tokens = self.convert_ids_to_tokens(token_ids)
        tokens = [token for token in tokens if not (skip_special_tokens and token in special_tokens)]
        is_added = (self.get_added_vocab().keys() - special_tokens).__contains__
        runs = groupby(tokens, key=is_added)
        texts = chain.from_iterable(run if added else [self._decode_run(*run)] for added, run in runs)
        return " ".join(filter(None, texts))

    def _decode_run(self, first: str, *others: str) -> str:
        return self.backend_tokenizer.decoder.decode([first.removeprefix("▁"), *others])

    def _save_slow_tokenizer_files(self, folder) -> list[str]:
        return list(self.save_vocabulary(folder))
