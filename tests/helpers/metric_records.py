"""Recorded predictions with their scores, from `metrics_goldens.tar.xz`."""

import json
import tarfile
from functools import lru_cache

from helpers.paths import TESTS_DIR


@lru_cache
def read_lines(name: str) -> list[dict]:
    """Read a JSONL file of the archive."""
    with tarfile.open(TESTS_DIR / "metrics_goldens.tar.xz") as archive:
        file = archive.extractfile(f"{name}.jsonl")
        assert file
        return [json.loads(line) for line in file]


def read_records(metric: str) -> list[dict]:
    """Return the recorded predictions of a metric."""
    return read_lines(metric)[:-1]


def read_aggregate(metric: str) -> dict:
    """Return the recorded numbers over all predictions of a metric."""
    return read_lines(metric)[-1]["aggregate"]
