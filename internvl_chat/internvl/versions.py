"""Versions of the libraries that the tests pass with."""

import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

logger = logging.getLogger(__name__)

# Library -> first version that has not been tested; the upper bounds of requirements.txt.
UNTESTED_VERSIONS = {
    "torch": "2.15",
    "transformers": "5.25",
    "peft": "0.22",
    "accelerate": "1.16",
    "deepspeed": "0.20",
    "bitsandbytes": "0.51",
}


def warn_about_untested_versions() -> None:
    """Log one warning for libraries that are newer than the tests.

    A new version may rename an argument that a model of this package then ignores, so its numbers need a look.
    """
    newer = []
    for library, bound in UNTESTED_VERSIONS.items():
        try:
            installed = version(library)
        except PackageNotFoundError:  # an optional library
            continue
        if Version(installed) >= Version(bound):
            newer.append(f"{library} {installed} (tested: < {bound})")
    if newer:
        logger.warning("Untested versions: %s. Compare losses and answers before relying on them.", ", ".join(newer))
