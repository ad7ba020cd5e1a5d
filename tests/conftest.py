"""Fixtures that several test files share."""

import tarfile
from pathlib import Path

import pytest
import torch

pytest_plugins = ["helpers.fixtures"]
TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def goldens(tmp_path_factory) -> Path:
    """The folder of reference numbers (tests/goldens.tar.xz, described in tests/README.md)."""
    folder = tmp_path_factory.mktemp("goldens")
    with tarfile.open(TESTS / "goldens.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "slow" not in item.keywords)  # first, so that other processes do the rest meanwhile
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
