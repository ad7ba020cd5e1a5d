"""Convert a checkpoint, or take parts of it."""

from internvl.command_line import exit_on_user_error
from internvl.commands.dispatch import run_command
from internvl.commands.table import CONVERSIONS


@exit_on_user_error
def main(argv: list[str]) -> int | None:
    return run_command("internvl convert", "Convert a checkpoint, or take parts of it.", CONVERSIONS, argv)
