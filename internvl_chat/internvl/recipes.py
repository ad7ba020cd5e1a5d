"""The recipes in `shell/`: find one by its name, and list their settings. No torch here."""

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

from internvl.nearest_name import suggest

RECIPE_DIR = Path(__file__).resolve().parent.joinpath("shell").resolve()
LAUNCH_SCRIPT = RECIPE_DIR / "launch.sh"
DEFAULT_ZERO_CONFIG = "zero_stage2_config.json"  # of launch.sh
# Of a recipe: it runs launch.sh, or a file of common flags that does.
LAST_LINE = re.compile(r"^(\.|source) .*\.sh[\"']?\s*\Z", re.MULTILINE)
LORA_PARTS = {"use_backbone_lora": "vision", "use_mlp_lora": "projector", "use_llm_lora": "LLM"}


class RecipeSettings(NamedTuple):
    """What `internvl train --list` shows of a recipe."""

    recipe: str
    model: str
    lora: str
    zero: str
    packing: str


@cache
def list_recipes() -> list[str]:
    """List the names of all recipes: paths below `shell/` without `.sh`."""
    scripts = [path.relative_to(RECIPE_DIR) for path in RECIPE_DIR.glob("*/**/*.sh") if path.name != "common.sh"]
    return sorted(str(path.with_suffix("")) for path in scripts)


def find_recipe(name: str) -> Path:
    """Find the script of a recipe.

    Args:
        name: a name of `list_recipes`, the unique end of one, or the path of a script that ends as recipes do.

    Raises:
        ValueError: there is no such recipe, or several recipes end with this name.
    """
    if name.endswith(".sh") and Path(name).is_file():
        if not LAST_LINE.search(Path(name).read_text(errors="replace")):
            raise ValueError(f"{name!r:.200} is not a recipe: it does not end with `. .../launch.sh`.")
        return Path(name).resolve()
    found = match_recipes(name)
    if len(found) > 1:
        raise ValueError(f"recipe {name!r:.80} is ambiguous: {', '.join(found)}.")
    if not found:
        stem, recipes = get_stem(name), list_recipes()
        ends = {recipe.rpartition("/")[2]: recipe for recipe in recipes}
        hint = suggest(stem, recipes) or suggest(stem, ends)
        raise ValueError(f"unknown recipe: {name!r:.80}{hint or '; `internvl train --list` lists all recipes.'}")
    return RECIPE_DIR / f"{found[0]}.sh"


def match_recipes(name: str) -> list[str]:
    """List the recipes that have this name, or else this end."""
    stem, recipes = get_stem(name), list_recipes()
    return [stem] if stem in recipes else [recipe for recipe in recipes if recipe.endswith(f"/{stem}")]


def get_stem(name: str) -> str:
    """Return the name of a recipe that is written as a path."""
    return name.removesuffix(".sh").removeprefix("shell/")


def describe_recipes(word: str = "") -> list[RecipeSettings]:
    """Describe all recipes that have this word in a column."""
    scripts = [RECIPE_DIR / f"{name}.sh" for name in list_recipes()]
    command = ["bash", RECIPE_DIR / "describe_recipes.sh", *scripts]
    # Not MODEL_PATH and others, which would replace those of the recipes.
    env = {"PATH": os.environ.get("PATH", os.defpath)}
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    settings = [read_settings(*lines[start : start + 4]) for start in range(0, len(lines), 4)]
    return [row for row in settings if word.lower() in " ".join(row).lower()]


def read_settings(script: str, model: str, zero_config: str, flags: str) -> RecipeSettings:
    """Read the four lines that describe_recipes.sh prints for a recipe."""
    values = dict(re.findall(r"--(\w+)[ =](\S+)", flags))
    stage = re.search(r"stage(\d)", zero_config or DEFAULT_ZERO_CONFIG)
    return RecipeSettings(
        recipe=str(Path(script).relative_to(RECIPE_DIR).with_suffix("")),
        model=model or values.get("llm_path", ""),
        lora=", ".join(f"{part} {values[flag]}" for flag, part in LORA_PARTS.items() if flag in values) or "no",
        zero=stage[1] if stage else "no",
        packing="yes" if values.get("use_packed_ds") == "True" else "no",
    )


def format_recipes(rows: list[RecipeSettings]) -> str:
    """Format a table with one recipe per line."""
    table = [RecipeSettings("recipe", "model", "LoRA rank", "ZeRO", "packed"), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)
    return "\n".join(lines)
