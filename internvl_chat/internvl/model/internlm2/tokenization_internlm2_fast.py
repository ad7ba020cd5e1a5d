"""Upstream's name for the fast tokenizer; here there is only one class."""

from .tokenization_internlm2 import InternLM2Tokenizer as InternLM2TokenizerFast

__all__ = ["InternLM2TokenizerFast"]
