"""Facade: upstream's import path of a function that does nothing here."""

from internvl.patch.replaced_functions import replace_gpt_oss_with_flash_sink_attn  # noqa: F401
