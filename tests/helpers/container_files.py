"""Read docker/Dockerfile and docker/internvl.def."""

import re
from typing import NamedTuple

from helpers.paths import REPO_ROOT

DOCKER_DIR = REPO_ROOT / "docker"


class Stage(NamedTuple):
    """A stage of an image.

    Args:
        base: image or stage that it starts from.
        instructions: (name, arguments) in their order.
    """

    base: str
    instructions: list[tuple[str, str]]

    def get_arguments(self, name: str) -> list[str]:
        """Return the arguments of all instructions of a name."""
        return [arguments for instruction, arguments in self.instructions if instruction == name]


def read_dockerfile() -> tuple[dict[str, str], dict[str, Stage]]:
    """Return the arguments before the first stage, and the stages by name."""
    text = re.sub(r"^#.*\n", "", (DOCKER_DIR / "Dockerfile").read_text(), flags=re.MULTILINE)
    arguments, stages = {}, {}
    instructions: list[tuple[str, str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        name, _, rest = " ".join(line.split()).partition(" ")
        if name == "FROM":
            base, _, stage = rest.split()
            instructions = []
            stages[stage] = Stage(base, instructions)
        elif name == "ARG" and not stages:
            arguments.update([rest.split("=", 1)])
        elif name:
            instructions.append((name, rest))
    return arguments, stages


def read_definition() -> list[dict[str, list[str]]]:
    """Return the sections of each stage of the Apptainer definition; "header" has Bootstrap, From and Stage."""
    stages: list[dict[str, list[str]]] = []
    section = "header"
    for line in (DOCKER_DIR / "internvl.def").read_text().splitlines():
        if line.startswith("Bootstrap:"):
            stages.append({})
            section = "header"
        if line.startswith("%"):
            section = line.strip()
        elif line.strip() and not line.startswith("#"):
            stages[-1].setdefault(section, []).append(line.strip())
    return stages


def split_commands(text: str) -> list[str]:
    """Split the argument of RUN at `&&`, without its mounts."""
    text = re.sub(r"--mount=\S+ ", "", text)
    return [" ".join(command.split()) for command in text.split(" && ")]
