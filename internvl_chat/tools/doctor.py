"""Print one page about this machine, which a bug report asks for.

    internvl doctor [--json] [FOLDER ...]

Versions, GPUs, NCCL, shared memory, folders and their free space, compilers, the optional libraries and what each
missing one costs, the launcher. At the end: known problems of this machine, what each costs, and what helps.

FOLDER are output folders of runs; default: the current folder. The exit status is 1 if training could not work. The
page holds no password, token or address, and `~` stands for the home directory. It is printed where libraries are
missing or broken, too. Imports take up to a minute. `gpu_check.py` then checks kernels and numbers, and trains.
"""

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import internvl
from internvl.command_line import exit_on_user_error
from internvl.tool_parser import ToolParser
from internvl.tools.machine_check.checks import describe_error
from internvl.tools.machine_check.gpus import describe_driver
from internvl.tools.machine_check.host import (
    FOLDERS,
    OUTPUT_FOLDER,
    describe_compilers,
    describe_environment,
    describe_folder,
    describe_host,
    describe_launcher,
    describe_system,
)
from internvl.tools.machine_check.known_problems import Facts, Problem, find_problems
from internvl.tools.machine_check.libraries import PACKAGES, import_libraries, list_conflicts, list_versions

SCHEMA_VERSION = 1  # of the JSON text
PAGE_WIDTH, LABEL_WIDTH = 120, 16  # characters
NO_DRIVER = "none found by nvidia-smi; a container needs `docker run --gpus all` or `apptainer --nv`"


@exit_on_user_error
def main(argv=None):
    args = parse_args(argv)
    facts = collect_facts(args.folders)
    problems = find_problems(facts)
    is_failed = any(problem.level == "error" for problem in problems)
    if args.json:
        status = {"internvl": internvl.__version__, "status": "failed" if is_failed else "passed"}
        report = {"schema": SCHEMA_VERSION, "problems": [problem._asdict() for problem in problems]}
        page = json.dumps(status | report | vars(facts), indent=1)
    else:
        page = format_page(facts, problems)
    print(hide_home(page))
    sys.exit(int(is_failed))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ToolParser(__doc__)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="output folders of runs (default: this folder)")
    parser.add_argument("--json", action="store_true", help="print the facts and problems as JSON")
    return parser.parse_args(argv)


# -- facts -------------------------------------------------------------------------------------------------------------


def collect_facts(output_folders: list[str]) -> Facts:
    """Collect what is known about this machine."""
    versions = list_versions()
    imports = import_libraries([name for name, found in versions.items() if found and PACKAGES[name].module])
    outputs = {
        f"output {path}": OUTPUT_FOLDER._replace(find=partial(get_path, path)) for path in output_folders or ["."]
    }
    return Facts(
        system=collect(describe_system),
        versions=versions,
        conflicts=list_conflicts() if versions["packaging"] else [],
        imports=imports,
        torch=imports["torch"] if "cuda" in imports.get("torch", {}) else {},
        driver=collect(describe_driver),
        host=collect(describe_host),
        compilers=collect(describe_compilers),
        folders={purpose: collect(partial(describe_folder, folder)) for purpose, folder in (FOLDERS | outputs).items()},
        launcher=collect(describe_launcher),
        environment=describe_environment(),
    )


def collect(describe_fn: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the facts of a function, or {"error": reason}: this page is for machines where things fail."""
    try:
        return describe_fn()
    except Exception as error:
        return {"error": describe_error(error)}


def get_path(path: str, env: object) -> str:
    """Return the path of an output folder (a `Folder.find`)."""
    return path


# -- page --------------------------------------------------------------------------------------------------------------


def format_page(facts: Facts, problems: list[Problem]) -> str:
    """Format facts and problems as text."""
    extras = dict.fromkeys(package.extra for package in PACKAGES.values() if package.extra != "required")
    sections = {
        "Versions": list_version_lines(facts),
        "GPUs": list_gpu_lines(facts),
        "Host": list_host_lines(facts),
        "Folders": {purpose: describe_space(found) for purpose, found in facts.folders.items()},
        "Extras": {extra: describe_extra(extra, facts) for extra in extras},
    }
    lines = []
    for title, values in sections.items():
        lines += [title, *(format_line(label, text) for label, text in values.items()), ""]
    lines.append("Known problems")
    for level, found, cost, remedy in problems:
        lines += [format_line(level, found), format_line("  cost", cost), format_line("  remedy", remedy)]
    counts = {level: sum(problem.level == level for problem in problems) for level in ("error", "warning")}
    return "\n".join([*lines, f"  Errors: {counts['error']}, warnings: {counts['warning']}."])


def format_line(label: str, text: str) -> str:
    """Format a label and a text. It is wrapped between words, so that paths can be copied."""
    start = f"  {label:<{LABEL_WIDTH}} "
    lines = textwrap.wrap(text, PAGE_WIDTH - len(start), break_long_words=False, break_on_hyphens=False)
    return start + ("\n" + " " * len(start)).join(lines)


def list_version_lines(facts: Facts) -> dict[str, str]:
    """List this package, Python, the system and the required libraries."""
    own = f"{internvl.__version__} ({Path(internvl.__file__).parent})"
    return {"internvl": own} | facts.system | {"libraries": describe_extra("required", facts)}


def list_gpu_lines(facts: Facts) -> dict[str, str]:
    """List driver, CUDA, NCCL, the GPUs and their links."""
    driver, torch = facts.driver, facts.torch
    lines = {"driver": f"{driver['version']}, up to CUDA {driver['cuda']}" if driver.get("gpus") else NO_DRIVER}
    if torch:
        parts = [
            f"{name} {torch[name.lower()]}" for name in ("CUDA", "ROCm", "cuDNN", "NCCL") if torch.get(name.lower())
        ]
        lines["torch"] = ", ".join(parts) or "built for CPUs only"
        if not facts.gpus:
            lines["torch"] += "; finds no GPU" + f" ({torch['reason']})" * bool(torch.get("reason"))
    for index, gpu in enumerate(facts.gpus):
        capability = ".".join(map(str, gpu["capability"]))
        memory = gpu.get("error") or f"{gpu['free_gib']} of {gpu['total_gib']} GiB free"
        lines[f"GPU {index}"] = f"{gpu['name']}, compute capability {capability}, {memory}"
    if not facts.gpus:
        lines |= {f"GPU {n}": ", ".join(gpu.values()) for n, gpu in enumerate(driver.get("gpus", []))}
    if torch.get("gpu_pairs"):
        links = ", ".join(f"{name} x {count}" for name, count in driver.get("links", {}).items()) or "unknown"
        lines["links"] = (
            f"peer access between {torch['peer_access_pairs']} of {torch['gpu_pairs']} pairs; links: {links}"
        )
    return lines


def list_host_lines(facts: Facts) -> dict[str, str]:
    """List memory, compilers, the launcher and environment variables."""
    compilers = {name: found or "missing" for name, found in facts.compilers.items()}
    lines = {}
    for name, value in (facts.host | compilers | facts.launcher).items():
        unit = " GiB" if name.endswith("_gib") else ""
        lines[name.removesuffix("_gib").replace("_", " ")] = f"{value}{unit}"
    variables = " ".join(f"{name}={value!r}" for name, value in facts.environment.items())
    return lines | {"variables": variables or "none"}


def describe_space(found: dict[str, Any]) -> str:
    """Describe a folder and its free space."""
    if "free_gib" not in found:
        return found.get("error") or found["obstacle"]
    space = f"{found['path']}, {found['free_gib']} of {found['total_gib']} GiB free"
    return f"{space}; {found['obstacle']}" if found["obstacle"] else space


def describe_extra(extra: str, facts: Facts) -> str:
    """Describe the libraries of an extra: those that are installed, and what each missing one costs."""
    installed, missing = [], {}
    for name, package in PACKAGES.items():
        if package.extra == extra and facts.versions[name]:
            installed.append(f"{name} {facts.versions[name]}")
        elif package.extra == extra:
            missing.setdefault(package.cost, []).append(name)
    texts = [f"missing {', '.join(names)}: {cost}" for cost, names in missing.items()]
    return "; ".join(([", ".join(installed)] if installed else []) + texts)


def hide_home(text: str) -> str:
    """Replace the home directory, whose name is often that of a person, by `~`."""
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if home.startswith("/") else text


if __name__ == "__main__":
    main()
