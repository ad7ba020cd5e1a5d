"""First thing that the process of a rank does, before it imports torch."""

import os
import sys

from internvl.launchers import validate_environment
from internvl.runtime.console import protect_console
from internvl.runtime.parent import exit_with_launcher
from internvl.runtime.signals import is_rank_0, preemption


def prepare_rank() -> None:
    """Protect the console, handle preemption signals, end with the launcher, check the environment."""
    protect_console()
    preemption.listen()
    exit_with_launcher()
    try:
        validate_environment(os.environ)
    except ValueError as error:
        sys.exit(f"error: {error}" if is_rank_0() else 1)
