"""Conversion to transformers' own InternVL layout and back."""
