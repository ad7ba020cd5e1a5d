"""Reference cases of the model package: one parametrized run per folder of the goldens, whatever folders there are."""

import tarfile
from pathlib import Path

import pytest
from helpers.model_cases import ARCHIVE, REAL_CONFIGS, Case

from internvl.model.internvl_chat import InternVLChatConfig

FOLDERS = {
    "model_case": (
        "config.json",
        lambda parts: parts[0] == "models" and not parts[1].endswith("_lora") and len(parts) == 3,
    ),
    "lora_case": ("config.json", lambda parts: parts[0] == "models" and parts[1].endswith("_lora") and len(parts) == 3),
    "packed_case": ("packed.json", lambda parts: parts[0] == "models"),
    "trajectory": (".json", lambda parts: parts[0] == "trajectories"),
    "e2e_case": ("expected.json", lambda parts: parts[0] == "e2e"),
}


def pytest_generate_tests(metafunc):
    for fixture in FOLDERS.keys() & set(metafunc.fixturenames):
        ending, wanted = FOLDERS[fixture]
        with tarfile.open(ARCHIVE) as archive:
            paths = [
                Path(name) for name in archive.getnames() if name.endswith("/" + ending) or ending == Path(name).suffix
            ]
        names = sorted(path.parts[1].removesuffix(".json") for path in paths if wanted(path.parts))
        assert names, f"the goldens have no {fixture}"
        metafunc.parametrize(fixture, names, indirect=True)


def _case(request, goldens) -> Case:
    return Case(goldens / "models" / request.param)


model_case = pytest.fixture(_case, name="model_case")
lora_case = pytest.fixture(_case, name="lora_case")
packed_case = pytest.fixture(_case, name="packed_case")


@pytest.fixture
def trajectory(request, goldens) -> Path:
    return goldens / "trajectories" / f"{request.param}.json"


@pytest.fixture
def e2e_case(request, goldens) -> Path:
    return goldens / "e2e" / request.param


@pytest.fixture(params=REAL_CONFIGS, ids=lambda path: path.stem)
def real_config(request) -> InternVLChatConfig:
    return InternVLChatConfig.from_pretrained(request.param)
