"""Run the command that a command line names."""

import sys
from collections.abc import Mapping
from importlib import import_module

from internvl.commands.table import Command
from internvl.nearest_name import suggest
from internvl.versions import require_supported_versions

NEED_NO_LIBRARY = ("train", "convert", "doctor")  # the first two start other programs, the doctor reports old versions


def run_command(program: str, description: str, commands: Mapping[str, Command], argv: list[str]) -> int | None:
    """Run one of these commands with the words after its name.

    Without a name, print the help.

    Raises:
        ValueError: there is no such command, or a package that it needs is missing.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(format_help(program, description, commands))
        return 0
    name = argv[0].replace("_", "-")
    if name not in commands:
        hint = suggest(name, commands, f"{program} ") or f"; `{program} --help` lists all commands."
        raise ValueError(f"unknown command: {argv[0]!r:.80}{hint}")
    command = commands[name]
    # argparse names the program by it.
    sys.argv = [f"{program} {name}", *argv[1:]]
    try:
        if name not in NEED_NO_LIBRARY:
            require_supported_versions()
        if command.is_rank:
            from internvl.runtime.process import prepare_rank

            prepare_rank()
        module = import_module(command.module)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("internvl."):
            raise
        missing = f"the package {error.name}, which is not installed" if error.name else f"more: {error}"
        raise ValueError(f"{sys.argv[0]} requires {missing}; `internvl doctor` lists what is installed.") from error
    return module.main(argv[1:])


def format_help(program: str, description: str, commands: Mapping[str, Command]) -> str:
    """Format the list of commands."""
    width = max(map(len, commands)) + 2
    rows = [f"  {name:{width}}{command.summary}" for name, command in commands.items()]
    return "\n".join(
        [f"usage: {program} COMMAND ...", "", description, "", *rows, "", f"{program} COMMAND --help describes one."]
    )
