"""Recipes that run a few lines of code instead of training."""

from pathlib import Path

from helpers.paths import EXAMPLE_META


def replace_training(folder: Path, code: str) -> dict[str, object]:
    """Write a program; return the recipe variables that run it.

    It runs on the CPU instead of the training program.
    """
    entry = folder / "entry.py"
    entry.write_text(code)
    variables = {"ENTRY": entry, "OUTPUT_DIR": folder / "out", "META_PATH": EXAMPLE_META, "MODEL_PATH": "none/none"}
    return variables | {"CUDA_VISIBLE_DEVICES": ""}
