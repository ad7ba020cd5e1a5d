"""Facade: upstream's import path of `internvl.constants`."""

from internvl.constants import *  # noqa: F403
