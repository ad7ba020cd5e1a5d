# PYTHON_ARGCOMPLETE_OK
"""The command `internvl`. Nothing here imports torch: help and errors take a fraction of a second."""

import os
import sys

from internvl import __version__
from internvl.command_line import exit_on_user_error
from internvl.commands.dispatch import run_command
from internvl.commands.table import COMMANDS

DESCRIPTION = "Fine-tune InternVL models, evaluate them, and hand them to a server."


@exit_on_user_error
def main(argv: list[str] | None = None) -> int | None:
    """Run a command; the exit status is that of the command."""
    argv = sys.argv[1:] if argv is None else argv
    if "_ARGCOMPLETE" in os.environ:
        from internvl.commands.completion import complete

        complete()
    if argv[:1] in (["--version"], ["-V"]):
        print(f"internvl {__version__}")
        return 0
    return run_command("internvl", DESCRIPTION, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
