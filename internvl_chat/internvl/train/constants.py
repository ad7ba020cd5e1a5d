"""Upstream's path of `internvl.constants`."""

from internvl.constants import *  # noqa: F403
