"""Fixtures of reference cases, parametrized over the folders of the goldens."""

import functools
import tarfile
from pathlib import Path

import pytest
from helpers.model_cases import ModelCase
from helpers.paths import GOLDENS_ARCHIVE, REAL_CONFIGS

from internvl.model.internvl_chat import InternVLChatConfig

# Fixture -> (name or suffix of a file in the goldens, whether its path is a case).
FIXTURES = {
    "model_case": (
        "config.json",
        lambda parts: parts[0] == "models" and not parts[1].endswith("_lora") and len(parts) == 3,
    ),
    "lora_case": ("config.json", lambda parts: parts[0] == "models" and parts[1].endswith("_lora") and len(parts) == 3),
    "packed_case": ("packed.json", lambda parts: parts[0] == "models"),
    "trajectory": (".json", lambda parts: parts[0] == "trajectories"),
    "e2e_case": ("expected.json", lambda parts: parts[0] == "e2e"),
}


@functools.cache  # reading the names decompresses the archive: 0.4 s
def list_golden_paths() -> list[Path]:
    with tarfile.open(GOLDENS_ARCHIVE) as archive:
        return [Path(name) for name in archive.getnames()]


def pytest_generate_tests(metafunc):
    for fixture in FIXTURES.keys() & set(metafunc.fixturenames):
        file_suffix, is_wanted_fn = FIXTURES[fixture]
        paths = [path for path in list_golden_paths() if file_suffix in (path.name, path.suffix)]
        names = sorted(path.parts[1].removesuffix(".json") for path in paths if is_wanted_fn(path.parts))
        assert names, f"no {fixture} in the goldens"
        metafunc.parametrize(fixture, names, indirect=True)


def _make_case(request, goldens) -> ModelCase:
    return ModelCase(goldens / "models" / request.param)


model_case = pytest.fixture(_make_case, name="model_case")
lora_case = pytest.fixture(_make_case, name="lora_case")
packed_case = pytest.fixture(_make_case, name="packed_case")


@pytest.fixture
def trajectory(request, goldens) -> Path:
    return goldens / "trajectories" / f"{request.param}.json"


@pytest.fixture
def e2e_case(request, goldens) -> Path:
    return goldens / "e2e" / request.param


@pytest.fixture(params=REAL_CONFIGS, ids=lambda path: path.stem)
def real_config(request) -> InternVLChatConfig:
    return InternVLChatConfig.from_pretrained(request.param)
