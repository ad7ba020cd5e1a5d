"""Facade: upstream's import path of a function that does nothing here."""

from internvl.patch.replaced_functions import replace_llama_attn_with_flash_attn  # noqa: F401
