"""Facade: upstream's import path of a function that does nothing here."""

from internvl.patch.replaced_functions import apply_liger_kernel_to_internvit  # noqa: F401
