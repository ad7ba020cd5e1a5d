"""The name that was probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def suggest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return the end of a message about a misspelled name.

    It is empty if no name is close.

    Args:
        prefix: what a user writes before the name, such as `--`.
    """
    nearest = get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""
