"""Run tests in environments with other versions of Python and of the libraries; see versions.sh.

`ENVIRONMENTS` is the table. `newest` has what pip installs from requirements.txt, `floor` its lower bounds.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from helpers.environments import find_python, layer_environment, make_environment, make_environment_layer
from helpers.paths import REPO_ROOT
from packaging.requirements import Requirement


class Environment(NamedTuple):
    """Versions to test with.

    Args:
        python: such as "3.12"; None: a layer over the main environment, with its Python and torch.
        versions: of some libraries; pip chooses those of the others.
        is_oldest: every other library has its lower bound.
    """

    python: str | None
    versions: str = ""
    is_oldest: bool = False


ENVIRONMENTS = {
    "floor": Environment("3.10", is_oldest=True),
    "libraries": Environment(None, "transformers==5.8.0 peft==0.19.1 accelerate==1.8.1"),
    "torch29": Environment("3.12", "torch==2.9.1 transformers==5.12.0 peft==0.20.0 accelerate==1.12.0"),
    "middle": Environment("3.12", "torch==2.11.0 transformers==5.17.0 peft==0.20.0 accelerate==1.15.0"),
    "newest": Environment("3.13"),
}
# Models, data, planning, LoRA, ZeRO, resuming. `test_small_patch` makes an environment with upstream's versions.
TESTS = "test_conversation test_versions test_library_internals test_torch_internals test_dist_utils".split()
TESTS = [f"tests/{name}.py" for name in TESTS]
TESTS += [f"tests/{folder}" for folder in "arguments model data planning checkpoint train".split()]
TESTS += ["--ignore", "tests/model/test_small_patch.py"]
PRINT_VERSIONS = """
import importlib.metadata, platform, sys
print(platform.python_version(), *map(importlib.metadata.version, sys.argv[1:]))
"""
SHOWN = "torch transformers peft accelerate deepspeed timm numpy pillow".split()
# Always the newest: tools of the tests, and bitsandbytes, whose lower bound needs a GPU.
NOT_OLDEST = "pytest pytest-xdist hypothesis ruff pyrefly moto pillow-heif bitsandbytes".split()


def read_requirements() -> list[Requirement]:
    """Read the lines of requirements.txt that apply to this machine."""
    lines = (line.split("#")[0].strip() for line in (REPO_ROOT / "requirements.txt").read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return [req for req in requirements if req.marker is None or req.marker.evaluate()]


def get_oldest(requirement: Requirement) -> str:
    """Return the lower bound of a requirement."""
    (bound,) = [clause.version for clause in requirement.specifier if clause.operator == ">="]
    return bound


def list_pip_arguments(environment: Environment) -> list[str]:
    """List what pip installs into an environment."""
    arguments = {line.split("==")[0]: line for line in environment.versions.split()}
    if environment.python is None:
        return list(arguments.values())
    for requirement in read_requirements():
        is_oldest = environment.is_oldest and requirement.name not in NOT_OLDEST
        version = f"=={get_oldest(requirement)}" if is_oldest else requirement.specifier
        extras = f"[{','.join(requirement.extras)}]" if requirement.extras else ""
        arguments.setdefault(requirement.name, f"{requirement.name}{extras}{version}")
    return list(arguments.values())


def make_python(name: str) -> Path | None:
    """Make the environment of a name, or take a path to a Python as it is.

    Returns:
        Its Python; None, with a message, if the Python that it needs is not installed.
    """
    if name not in ENVIRONMENTS:
        return Path(name)
    environment = ENVIRONMENTS[name]
    print(f"{name}: installing", flush=True)
    if environment.python is None:
        return make_environment_layer(name, list_pip_arguments(environment))
    base = find_python(environment.python)
    if base is None:
        print(f"{name}: skipped, Python {environment.python} is not installed", flush=True)
        return None
    return make_environment(name, base, list_pip_arguments(environment))


def run_tests(python: Path, options: list[str]) -> tuple[list[str], bool]:
    """Run the tests in an environment.

    Returns the column of the table (the installed versions, then pytest's counts), and whether all tests passed.
    """
    ask = [python, "-c", PRINT_VERSIONS, *SHOWN]
    versions = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.split()
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-m", "", *options]
    last_line = ""
    with subprocess.Popen(
        command, cwd=REPO_ROOT, env=layer_environment(python), stdout=subprocess.PIPE, text=True
    ) as run:
        for last_line in run.stdout:
            print(last_line, end="", flush=True)
    counts = re.sub(r"[=\s]*(.*?)( in .*)", r"\1", last_line).strip()
    return [*versions, counts], run.returncode == 0


def is_environment(word: str) -> bool:
    """Return whether a word of the command line is the name or the Python of an environment."""
    return word in ENVIRONMENTS or Path(word).name.startswith("python")


def main(words: list[str]) -> int:
    names = [word for word in words if is_environment(word)] or list(ENVIRONMENTS)
    options = [word for word in words if not is_environment(word)]
    if not any(option.startswith("tests/") for option in options):
        options += TESTS
    pythons = {name: make_python(name) for name in names}
    results = {name: run_tests(python, options) for name, python in pythons.items() if python}

    for label, *cells in zip(
        ["", "python", *SHOWN, "tests"], *([name, *column] for name, (column, _) in results.items()), strict=True
    ):
        print(f"{label:14}", *(f"{cell:28}" for cell in cells))
    return int(not all(passed for _, passed in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
