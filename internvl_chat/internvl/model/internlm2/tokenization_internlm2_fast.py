"""Upstream's fast tokenizer, which differs from the other in the side on which it pads."""

from internvl.model.internlm2.tokenization_internlm2 import InternLM2Tokenizer


class InternLM2TokenizerFast(InternLM2Tokenizer):
    """`InternLM2Tokenizer`, padding on the left."""

    padding_side = "left"
