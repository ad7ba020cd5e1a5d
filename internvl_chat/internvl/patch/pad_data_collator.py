"""Upstream's module of collators, which are in `internvl/data/collators.py` here."""

from internvl.data.collators import concat_pad_data_collator, dpo_concat_pad_data_collator, pad_data_collator

__all__ = ["concat_pad_data_collator", "dpo_concat_pad_data_collator", "pad_data_collator"]
