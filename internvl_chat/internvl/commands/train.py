"""Start a training: a recipe, flags, or the run.yaml of a run.

    internvl train RECIPE [FLAGS]                                   see --list; FLAGS override those of the recipe
    internvl train --meta_path META --output_dir DIR ... [FLAGS]    without a recipe
    internvl train --config FILE [FLAGS]                            as the run that wrote FILE, its run.yaml

RECIPE is a name of --list, the end of one, or the path of a script. Recipes read variables: MODEL_PATH, META_PATH,
OUTPUT_DIR, BATCH_SIZE. Under SLURM srun starts the ranks; elsewhere torchrun does. NODES, PARTITION and others are
described in shell/launch.sh. Without a GPU the ranks run on the CPU.
"""

import argparse
import os
import sys

from internvl.arguments.run_file import CONFIG_FLAG, format_flag, read_run_file
from internvl.arguments.topics import TOPICS
from internvl.command_line import INPUT_FLAGS, exit_on_user_error
from internvl.commands.training_flags import describe_unknown_flag, format_flags
from internvl.recipes import LAUNCH_SCRIPT, describe_recipes, find_recipe, format_recipes, match_recipes

LAUNCHER_FLAGS = ("output_dir", *INPUT_FLAGS)  # launch.sh reads them, but no YAML
PREFERENCE_FLAGS = TOPICS["preference"].split()
MAX_RANKS_PER_NODE = 1024


@exit_on_user_error
def main(argv: list[str]) -> None:
    args, words = parse_args(argv)
    if args.list is not None:
        print_recipes(args.list)
        return
    recipe = words.pop(0) if words and not words[0].startswith("-") else None
    for word in words:
        if match_recipes(word):
            raise ValueError(f"expected one recipe, before all flags: move {word!r:.80}, or remove it.")
    names = [word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")]
    for name in names:
        require_known_flag(name)
    config = read_configs(args.config)
    if recipe:
        if args.config or args.preference:
            raise ValueError(f"{CONFIG_FLAG} and --preference are for runs without a recipe: remove {recipe!r:.80}.")
        script = find_recipe(recipe)
    elif config or words:
        script = LAUNCH_SCRIPT
        from_files = [format_flag(name, config[name]) for name in LAUNCHER_FLAGS if name in config.keys() - {*names}]
        words = [*(f"{CONFIG_FLAG}={path}" for path in args.config), *from_files, *words]
        args.preference |= any(name in PREFERENCE_FLAGS for name in [*names, *config])
    else:
        raise ValueError(f"expected a recipe (--list lists them), {CONFIG_FLAG} FILE, or flags (see --help).")
    os.execvpe("bash", ["bash", str(script), *words], make_environment(args))


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the flags of this command.

    Returns the recipe and the flags of training as they are.
    """
    parser = argparse.ArgumentParser(
        usage="internvl train [RECIPE | --config FILE] [--nproc N] [--dry-run] [FLAGS]",
        description=__doc__,
        epilog=format_flags() if {"-h", "--help"} & {*argv} else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--list", nargs="?", const="", metavar="WORD", help="list the recipes (that contain WORD)")
    parser.add_argument(
        CONFIG_FLAG, action="append", default=[], metavar="FILE", help="flags by name, such as OUTPUT_DIR/run.yaml"
    )
    parser.add_argument("--nproc", metavar="N", help="ranks on this machine, or on each node; auto: one per GPU")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print the command that starts the ranks")
    parser.add_argument(
        "--preference", action="store_true", help="train on pairs of answers; flags such as --loss_type imply it"
    )
    return parser.parse_known_args(argv)


def print_recipes(word: str) -> None:
    """Print the recipes that contain a word, with their settings."""
    rows = describe_recipes(word)
    if not rows:
        raise ValueError(f"no recipe contains {word!r:.80}; `internvl train --list` lists all recipes.")
    print(format_recipes(rows))


def read_configs(paths: list[str]) -> dict[str, str | list[str]]:
    """Read the flags of files; those of a later file override the others."""
    config = {}
    for path in paths:
        for name, flag in read_run_file(path).items():
            place = f"{path}, line {flag.line}: "
            if "-" in name:
                raise ValueError(f"{place}unknown flag: {name!r:.80}; names of flags have underscores in a file.")
            require_known_flag(name, place)
            config[name] = flag.value
    return config


def require_known_flag(name: str, place: str = "") -> None:
    """Raise a ValueError if no training program has this flag.

    Args:
        place: where it is, as the start of the message.
    """
    if hint := describe_unknown_flag(name):
        raise ValueError(f"{place}unknown flag: --{name:.80}{hint}")


def make_environment(args: argparse.Namespace) -> dict[str, str]:
    """Return the environment for launch.sh.

    It names this Python, and has what the flags of this command say.
    """
    # DeepSpeed finds ninja on PATH.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    env = os.environ | {"INTERNVL_PYTHON": sys.executable, "PATH": path}
    if args.dry_run:
        env["DRY_RUN"] = "1"
    if args.preference:
        env["ENTRY"] = "internvl_chat_mpo.py"
    if args.nproc:
        for name in ("GPUS", "GPUS_PER_NODE"):
            env.pop(name, None)
        if args.nproc != "auto":
            env["GPUS_PER_NODE"] = str(parse_nproc(args.nproc))
    return env


def parse_nproc(text: str) -> int:
    """Parse the number of ranks on a node."""
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_RANKS_PER_NODE):
        raise ValueError(f"--nproc {text:.80} is invalid: expected auto, or an integer from 1 to {MAX_RANKS_PER_NODE}.")
    return int(text)
