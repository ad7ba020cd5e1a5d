"""Upstream's fast InternLM2 tokenizer."""

from internvl.model.internlm2.tokenization_internlm2 import InternLM2Tokenizer


class InternLM2TokenizerFast(InternLM2Tokenizer):
    """InternLM2Tokenizer that pads on the left."""

    padding_side = "left"
