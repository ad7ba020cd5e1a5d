"""Run tests with the oldest and newest allowed versions of other libraries.

The bounds are those of requirements.txt; see versions.sh.
"""

import re
import subprocess
import sys

from helpers.environments import layer_environment, make_environment_layer
from helpers.paths import REPO_ROOT
from packaging.requirements import Requirement

# `test_small_patch` runs in another environment, with upstream's versions.
TESTS = [
    "tests/test_conversation.py",
    "tests/model",
    "tests/data",
    "tests/train",
    "--ignore",
    "tests/model/test_small_patch.py",
]


def read_requirements() -> list[Requirement]:
    """Read the lines of requirements.txt that apply to this Python."""
    lines = (line.split("#")[0].strip() for line in (REPO_ROOT / "requirements.txt").read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return [req for req in requirements if req.marker is None or req.marker.evaluate()]


def pin_oldest(requirement: Requirement) -> str:
    """Return the requirement with its lower bound as the version."""
    (bound,) = [clause.version for clause in requirement.specifier if clause.operator == ">="]
    return f"{requirement.name}=={bound}"


def allow_newest(requirement: Requirement) -> str:
    """Return the requirement as it is: pip installs the newest version."""
    return f"{requirement.name}{requirement.specifier}"


PRINT_VERSIONS = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
ENVIRONMENTS = {"floor": pin_oldest, "newest": allow_newest}


def run_tests(name: str, requirements: list[Requirement], options: list[str]) -> tuple[list[str], bool]:
    """Run the tests in an environment.

    Returns the column of the table (the installed versions, then pytest's counts), and whether all tests passed.
    """
    print(f"{name}: installing", flush=True)
    python = make_environment_layer(name, [ENVIRONMENTS[name](requirement) for requirement in requirements])
    ask = [python, "-c", PRINT_VERSIONS, *(requirement.name for requirement in requirements)]
    versions = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.split()
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-m", "", *TESTS, *options]
    last_line = ""
    with subprocess.Popen(
        command, cwd=REPO_ROOT, env=layer_environment(python), stdout=subprocess.PIPE, text=True
    ) as run:
        for last_line in run.stdout:
            print(last_line, end="", flush=True)
    counts = re.sub(r"[=\s]*(.*?)( in .*)", r"\1", last_line).strip()
    return [*versions, counts], run.returncode == 0


def main(words: list[str]) -> int:
    names = [word for word in words if word in ENVIRONMENTS] or list(ENVIRONMENTS)
    options = [word for word in words if word not in ENVIRONMENTS]
    requirements = read_requirements()
    results = {name: run_tests(name, requirements, options) for name in names}

    labels = ["", *(requirement.name for requirement in requirements), "tests"]
    for label, *cells in zip(labels, *([name, *column] for name, (column, _) in results.items()), strict=True):
        print(f"{label:14}", *(f"{cell:28}" for cell in cells))
    return int(not all(passed for _, passed in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
