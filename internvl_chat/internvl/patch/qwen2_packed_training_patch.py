"""Facade: upstream's import path of a function that does nothing here."""

from internvl.patch.replaced_functions import replace_qwen2_attention_class  # noqa: F401
