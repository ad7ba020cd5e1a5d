"""Tokenizers of all versions of InternVL."""
