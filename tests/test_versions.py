"""Versions of libraries: bounds, too old ones, untested ones, optional packages that are missing."""

import re
import subprocess
import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest requires it

import pytest
from helpers.paths import PACKAGE_DIR, REPO_ROOT
from packaging.requirements import Requirement
from packaging.version import Version
from versions import ENVIRONMENTS, get_oldest, list_pip_arguments, read_requirements

from internvl import versions


def read_requirement_sections() -> dict[str, list[str]]:
    """Read requirements.txt: "" -> the first lines, extra -> the lines below `# extra NAME`."""
    sections = {"": []}
    for line in (REPO_ROOT / "requirements.txt").read_text().splitlines():
        if line.startswith("# extra "):
            sections[re.split("[ :]", line)[2]] = []
        elif requirement := line.split("#")[0].strip():
            sections[list(sections)[-1]].append(requirement)
    return sections


def test_requirements_are_the_dependencies_and_extras_of_pyproject():
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # vLLM pins another torch; documentation and notebooks are made in environments of their own.
    included = {name: items for name, items in extras.items() if name not in ("all", "serve", "docs", "notebook")}
    assert read_requirement_sections() == {"": project["dependencies"], **included}
    (everything,) = map(Requirement, extras["all"])
    assert (everything.name, everything.extras) == (project["name"], {*included} - {"dev"})


def test_oldest_versions_are_the_lower_bounds_of_the_requirements():
    bounds = {requirement.name: Version(get_oldest(requirement)) for requirement in read_requirements()}
    oldest = versions.OLDEST_VERSIONS | {name: bound for name, (_, bound) in versions.OPTIONAL_PACKAGES.items()}
    assert {name: Version(bound) for name, bound in oldest.items()} == {name: bounds[name] for name in oldest}


def test_the_matrix_begins_at_the_lower_bounds():
    bounds = {requirement.name: get_oldest(requirement) for requirement in read_requirements()}
    assert {f"{name}=={bound}" for name, bound in bounds.items()} >= {
        argument for argument in list_pip_arguments(ENVIRONMENTS["floor"]) if "==" in argument
    }
    for requirement in map(Requirement, list_pip_arguments(ENVIRONMENTS["libraries"])):
        (clause,) = requirement.specifier
        assert Version(clause.version) == Version(bounds[requirement.name])


@pytest.mark.parametrize("is_newer", [False, True])
def test_one_warning_names_all_newer_versions(is_newer, monkeypatch, caplog):
    installed = {name: bound if is_newer else "0.1" for name, bound in versions.UNTESTED_VERSIONS.items()}
    monkeypatch.setattr(versions, "version", installed.__getitem__)
    versions.warn_about_untested_versions()
    assert len(caplog.records) == is_newer
    if is_newer:
        assert all(f"{name} {Version(bound)}" in caplog.text for name, bound in versions.UNTESTED_VERSIONS.items())


def install_metadata(folder, name: str, version: str) -> None:
    """Make a package whose version metadata finds first."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "command",
    [
        "-c import\tinternvl",
        f"{PACKAGE_DIR}/internvl/train/internvl_chat_finetune.py --help",
        f"{PACKAGE_DIR}/tools/quickstart/digits.py --help",
        "-m internvl merge --help",
    ],
)
def test_a_library_that_is_too_old_is_named_in_one_sentence(command, tmp_path):
    done = run_with_old_library(command, tmp_path)
    *before, sentence = done.stderr.splitlines()
    assert "Versions that are too old: transformers 4.57.6 (required: >= 5.8). Update: " in sentence
    assert done.returncode == 1
    is_program = not command.startswith("-c")
    assert sentence.startswith("error: " if is_program else "ImportError: ")
    assert not (is_program and before)


def run_with_old_library(command: str, folder) -> subprocess.CompletedProcess:
    install_metadata(folder, "transformers", "4.57.6")
    environment = {"PYTHONPATH": f"{folder}:{PACKAGE_DIR}"}
    return subprocess.run([sys.executable, *command.split(" ")], capture_output=True, text=True, env=environment)


@pytest.mark.multiprocess
@pytest.mark.parametrize("command", ["-m internvl --help", "-m internvl doctor", f"{PACKAGE_DIR}/tools/doctor.py"])
def test_help_and_doctor_run_with_a_library_that_is_too_old(command, tmp_path):
    done = run_with_old_library(command, tmp_path)
    assert done.stderr == ""
    assert ("4.57.6" in done.stdout) == ("doctor" in command)


@pytest.mark.parametrize("library", versions.OLDEST_VERSIONS)
def test_oldest_versions_are_accepted_and_older_ones_refused(library, monkeypatch):
    installed = dict(versions.OLDEST_VERSIONS)
    monkeypatch.setattr(versions, "version", installed.__getitem__)
    versions.require_supported_versions()
    installed[library] = "0.9"
    with pytest.raises(ImportError, match=f"{library} 0.9 .required: >= {versions.OLDEST_VERSIONS[library]}"):
        versions.require_supported_versions()


def test_pre_releases_count_as_their_release(monkeypatch):
    """NVIDIA's containers have such versions of torch."""
    installed = versions.OLDEST_VERSIONS | {"torch": "2.6.0a0+df5bbc09d1.nv24.12"}
    monkeypatch.setattr(versions, "version", installed.__getitem__)
    versions.require_supported_versions()
    installed |= dict.fromkeys(versions.UNTESTED_VERSIONS, "0.1") | {"torch": "2.15.0a0+nv26.11"}
    assert "torch 2.15.0a0+nv26.11" in versions.describe_untested_versions()


def test_an_optional_package_that_is_missing_or_too_old_is_named(monkeypatch):
    versions.require_package("pyarrow", "a table")
    monkeypatch.setattr(versions, "version", {"pyarrow": "1.0"}.__getitem__)
    with pytest.raises(
        ValueError, match=r"^a table requires pyarrow >= 23.0, got 1.0: python3 -m pip install 'pyarrow"
    ):
        versions.require_package("pyarrow", "a table")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OSError, match="^a table requires the package pyarrow: python3 -m pip install pyarrow.$"):
        versions.require_package("pyarrow", "a table", OSError)


BLOCKED = (
    "av bitsandbytes datasets deepspeed jiwer liger_kernel matplotlib moto ninja pyarrow pillow_heif rouge_score s3fs"
)
BLOCKED += " sacrebleu scipy sklearn tensorboard"
WITHOUT_OPTIONAL_PACKAGES = f"""
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys({BLOCKED.split()!r})
import internvl
for module in pkgutil.walk_packages(internvl.__path__, "internvl."):
    # Those are imported only where they can run.
    if not ("remote_code." in module.name or module.name.endswith(("liger_layers", "benchmark.scaling", "__main__"))):
        importlib.import_module(module.name)
from internvl.arguments.training import TrainingArguments
cases = {{"deepspeed": "zero_stage2_config.json"}}, {{"report_to": "tensorboard"}}, {{"optim": "adamw_bnb_8bit"}}, {{}}
for flags in cases:
    try:
        TrainingArguments(output_dir=sys.argv[1], use_cpu=True, **flags)
        print("ok")
    except ValueError as error:
        print(error)
"""


@pytest.mark.multiprocess
def test_the_package_imports_without_optional_packages(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_OPTIONAL_PACKAGES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(PACKAGE_DIR)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "--deepspeed requires the package deepspeed: python3 -m pip install deepspeed.",
        "--report_to tensorboard is not available: it requires the package tensorboard.",
        "--optim adamw_bnb_8bit requires the package bitsandbytes: python3 -m pip install bitsandbytes.",
        "ok",
    ]
