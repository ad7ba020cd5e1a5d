"""The parts of the suite that meet other libraries, at both ends of what requirements.txt allows; see versions.sh."""

import re
import subprocess
import sys

from helpers.environments import ROOT, environ, layer
from packaging.requirements import Requirement

# `test_small_patch` has an environment of its own, whose versions are upstream's.
TESTS = [
    "tests/test_conversation.py",
    "tests/model",
    "tests/data",
    "tests/train",
    "--ignore",
    "tests/model/test_small_patch.py",
]


def requirements() -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    parsed = [Requirement(line) for line in lines if line]
    return [each for each in parsed if each.marker is None or each.marker.evaluate()]


def lowest(requirement: Requirement) -> str:
    (bound,) = [clause.version for clause in requirement.specifier if clause.operator == ">="]
    return f"{requirement.name}=={bound}"


def highest(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"  # pip takes the newest that fits


VERSIONS = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
ENDS = {"floor": lowest, "newest": highest}


def main(words: list[str]) -> int:
    ends = [word for word in words if word in ENDS] or list(ENDS)
    more = [word for word in words if word not in ENDS]
    needed, table, failed = requirements(), {}, False
    for end in ends:
        print(f"{end}: installing", flush=True)
        python = layer(end, [ENDS[end](requirement) for requirement in needed])
        ask = [python, "-c", VERSIONS, *(requirement.name for requirement in needed)]
        table[end] = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.split()
        tests = [python, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *TESTS, *more]
        with subprocess.Popen(tests, cwd=ROOT, env=environ(python), stdout=subprocess.PIPE, text=True) as run:
            lines = [print(line, end="", flush=True) or line for line in run.stdout]
        failed |= run.returncode != 0
        table[end].append(re.sub(r"[=\s]*(.*?)( in .*)", r"\1", lines[-1]).strip())

    for name, *versions in zip(["", *(r.name for r in needed), "tests"], *([e, *table[e]] for e in ends), strict=True):
        print(f"{name:14}", *(f"{version:28}" for version in versions))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
