"""The argument parser of the command-line tools."""

import argparse

from internvl.nearest_name import suggest


class ToolParser(argparse.ArgumentParser):
    """A parser whose help is a module's docstring, and whose errors name the nearest flag."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{suggest(flag, known)}")
        return parsed
