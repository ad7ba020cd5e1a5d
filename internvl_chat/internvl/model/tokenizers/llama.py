"""The tokenizer of Llama-type checkpoints with a sentencepiece `tokenizer.model`, such as InternVL2-4B's of Phi-3.

These models were trained with the slow class of transformers 4, which transformers 5 no longer has. Its fast class cuts
the inside of a text equally, but not its beginning, where the slow one puts a "▁" before whatever stands there, a space
or a chat marker, too; and it decodes tokens added to the vocabulary differently. This class gives the slow one's ids
and text. `model/tokenizer.py` chooses it.
"""

from itertools import chain, groupby

import transformers
from tokenizers import decoders, pre_tokenizers

from internvl.model.tokenizers.v4_compat import SavedForTransformers4


class LlamaTokenizer(SavedForTransformers4, transformers.LlamaTokenizer):
    """`legacy: false` of the slow class: one "▁" in front of a text, none behind a chat marker.

    `offset_mapping` refers to the text as given; `char_to_token` and its kin count the "▁" as a character.
    """

    def __init__(self, *args, **kwargs):
        # What stands here, the library took from the control pieces; a checkpoint's own list is `extra_special_tokens`.
        kwargs.pop("additional_special_tokens", None)
        super().__init__(*args, **kwargs)
        self.init_kwargs["legacy"] = self.legacy  # so that it is saved
        backend = self.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])

    def _encode_plus(self, text, text_pair=None, is_split_into_words=False, **kwargs):
        if is_split_into_words or text_pair is not None:
            raise ValueError("this tokenizer takes single texts, neither words nor pairs")
        texts = [text] if isinstance(text, str) else text
        named = tuple(self.all_special_tokens)
        marks = ["" if not one or one.startswith(named) else "▁" for one in texts]
        marked = [mark + one for mark, one in zip(marks, texts, strict=True)]
        encoded = super()._encode_plus(marked[0] if isinstance(text, str) else marked, **kwargs)
        if "offset_mapping" in encoded:
            rows = [encoded["offset_mapping"]] if isinstance(text, str) else encoded["offset_mapping"]
            shifted = [
                [(max(start - len(mark), 0), max(end - len(mark), 0)) for start, end in row]
                for mark, row in zip(marks, rows, strict=True)
            ]
            encoded["offset_mapping"] = shifted[0] if isinstance(text, str) else shifted
        return encoded

    def _decode(self, token_ids, skip_special_tokens=False, **_) -> str:
        """Added tokens stand between spaces and are never skipped, unless they are bos, eos, unk, pad or listed."""
        token_ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        named = set(self.all_special_tokens)
        tokens = self.convert_ids_to_tokens(token_ids)
        tokens = [token for token in tokens if not (skip_special_tokens and token in named)]
        runs = groupby(tokens, key=(self.get_added_vocab().keys() - named).__contains__)
        texts = chain.from_iterable(run if added else [self._join(*run)] for added, run in runs)
        return " ".join(filter(None, texts))

    def _join(self, first: str, *others: str) -> str:
        return self.backend_tokenizer.decoder.decode([first.removeprefix("▁"), *others])

    def _save_slow_files(self, folder) -> list[str]:
        return list(self.save_vocabulary(folder))
