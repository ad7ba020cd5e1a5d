"""Versions of libraries: the oldest that work, and the first that the tests have not seen.

`requirements.txt` and `pyproject.toml` have the same lower bounds.
"""

import importlib.util
import logging
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

logger = logging.getLogger(__name__)

# Required library -> oldest version that works. A newer API of a library is used behind a guard that names its version.
OLDEST_VERSIONS = {
    "torch": "2.6",  # transformers 5.24 requires it
    "transformers": "5.8",  # 5.6 keeps the number of outputs of a resized, tied LM head
    "peft": "0.19.1",  # 0.18 cannot train rows of new tokens of a tied LM head, 0.19.0 needs torch 2.7
    "accelerate": "1.8.1",  # older ones step after every micro-batch under DeepSpeed
}
# Optional package -> module to import, oldest version that works.
OPTIONAL_PACKAGES = {
    "av": ("av", "17.1"),  # 17.0.0 crashes when it opens some videos
    "bitsandbytes": ("bitsandbytes", "0.46.1"),  # transformers 5.3 requires it
    "deepspeed": ("deepspeed", "0.19.8"),  # 0.19.4 gives non-finite gradients with several ranks on CPUs
    "liger-kernel": ("liger_kernel", "0.8.3"),  # the first whose loss takes the size of its chunks
    "matplotlib": ("matplotlib", "3.8"),
    "pyarrow": ("pyarrow", "23.0"),  # 21.0.0 aborts the process at a memory limit
    "scikit-learn": ("sklearn", "1.3"),
}
# Library -> first version that has not been tested.
UNTESTED_VERSIONS = {
    "torch": "2.15",
    "transformers": "5.25",
    "peft": "0.22",
    "accelerate": "1.16",
    "deepspeed": "0.20",
    "bitsandbytes": "0.51",
}
PACKAGE_DIR = Path(__file__).resolve().parent
PROGRAM_PATHS = [(PACKAGE_DIR / name).resolve() for name in ("__main__.py", "shell", "tools", "train")]
COMMAND = "internvl"


def is_command() -> bool:
    """Return whether the running program is `internvl` or the doctor, or one of its processes."""
    name = Path(sys.argv[0]).name.partition(" ")[0]  # "internvl doctor" in the processes that it starts
    return name in (COMMAND, "doctor.py") or sys.orig_argv[1:3] == ["-m", COMMAND]


def require_supported_versions() -> None:
    """Check that no required library is too old.

    `import internvl` calls it, before anything else imports a name that an old version lacks. The command `internvl`
    calls it before it starts a tool: its help needs no library, and the doctor reports old ones.

    Raises:
        ImportError: a library is too old.
        SystemExit: so it is, and the running program is one of this repository: it prints the sentence alone.
    """
    older = {name: oldest for name, oldest in OLDEST_VERSIONS.items() if is_older(name, oldest)}
    if not older:
        return
    found = ", ".join(f"{name} {version(name)} (required: >= {oldest})" for name, oldest in older.items())
    wanted = " ".join(f"'{name}>={oldest}'" for name, oldest in older.items())
    message = f"Versions that are too old: {found}. Update: {sys.executable} -m pip install {wanted}"
    program = Path(getattr(sys.modules["__main__"], "__file__", None) or ".").resolve()
    if program.name == COMMAND or any(map(program.is_relative_to, PROGRAM_PATHS)):
        sys.exit(f"error: {message}")
    raise ImportError(message)


def is_older(library: str, oldest: str) -> bool:
    """Return whether a library is installed in a version before `oldest`."""
    try:
        return parse_release(version(library)) < parse_release(oldest)
    except PackageNotFoundError:
        return False


def parse_release(text: str):
    """Parse a version without its marks: 2.6.0a0+nv25.01, which NVIDIA's containers have, counts as 2.6.0.

    Returns:
        A `packaging.version.Version`.
    """
    from packaging.version import Version  # the doctor runs without it, too

    return Version(Version(text).base_version)


def require_package(name: str, purpose: str, error_class: type[Exception] = ValueError) -> None:
    """Check that an optional package is installed, and not too old.

    Args:
        name: a key of OPTIONAL_PACKAGES, or a package whose module has its name.
        purpose: begins the message, such as a flag.

    Raises:
        error_class: it is missing or too old.
    """
    module, oldest = OPTIONAL_PACKAGES.get(name, (name.replace("-", "_"), "0"))
    if importlib.util.find_spec(module) is None:
        raise error_class(f"{purpose} requires the package {name}: python3 -m pip install {name}.")
    if is_older(name, oldest):
        raise error_class(
            f"{purpose} requires {name} >= {oldest}, got {version(name)}: python3 -m pip install '{name}>={oldest}'."
        )


def describe_untested_versions() -> str:
    """Describe libraries that are newer than the tests; empty without one.

    A new version may rename an argument that a model of this package then ignores, so its numbers need a look.
    """
    newer = []
    for library, bound in UNTESTED_VERSIONS.items():
        try:
            installed = version(library)
        except PackageNotFoundError:  # an optional library
            continue
        if parse_release(installed) >= parse_release(bound):
            newer.append(f"{library} {installed} (tested: < {bound})")
    advice = "Compare losses and answers before relying on them."
    return f"Untested versions: {', '.join(newer)}. {advice}" if newer else ""


def warn_about_untested_versions() -> None:
    """Log one warning for libraries that are newer than the tests."""
    if description := describe_untested_versions():
        logger.warning(description)
