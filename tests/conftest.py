"""Shared fixtures, and the order in which tests run."""

import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from helpers.paths import GOLDENS_ARCHIVE

pytest_plugins = ["helpers.fixtures"]

# What takes minutes starts first: other workers run the short tests meanwhile (see `run.sh`).
LONGEST_MARKERS_FIRST = ("stress", "e2e", "serving", "multiprocess", "compile")


@pytest.fixture(scope="session")
def goldens(tmp_path_factory) -> Path:
    """Unpack the reference numbers of `goldens.tar.xz`, which `tests/README.md` describes."""
    folder = tmp_path_factory.mktemp("goldens")
    with tarfile.open(GOLDENS_ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def pytest_report_header(config) -> str:
    expression = config.option.markexpr
    return f"tests selected: {expression or 'all'}" + (" (all: bash tests/run.sh)" if expression else "")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, except from `pytest -m gpu`.

    All other tests compare numbers of a CPU, fork processes, or start more ranks than this machine may have GPUs.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(trylast=True)  # after `-m` has deselected tests: without a gpu test, torch need not be imported here
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def length_class(item: pytest.Item) -> int:
        ranks = [rank for rank, marker in enumerate(LONGEST_MARKERS_FIRST) if marker in item.keywords]
        return min(ranks, default=len(LONGEST_MARKERS_FIRST))

    # A file is one unit of work (`--dist loadfile`): among equals, files with many long tests start first.
    num_long_tests = Counter(item.path for item in items if length_class(item) < len(LONGEST_MARKERS_FIRST))
    items.sort(key=lambda item: (length_class(item), -num_long_tests[item.path]))

    gpu_tests = [item for item in items if "gpu" in item.keywords]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="requires a CUDA device and -m gpu"))
