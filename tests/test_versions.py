"""Versions of libraries: bounds, too old ones, untested ones, optional packages that are missing."""

import re
import subprocess
import sys

import pytest
from helpers.paths import PACKAGE_DIR, REPO_ROOT
from packaging.requirements import Requirement
from packaging.version import Version
from versions import ENVIRONMENTS, get_oldest, list_pip_arguments, read_requirements

from internvl import versions


def read_pyproject() -> dict[str, list[str]]:
    """Read the requirements of pyproject.toml: `dependencies` and the extras."""
    text = (REPO_ROOT / "pyproject.toml").read_text()  # Python 3.10 has no tomllib
    lists = re.findall(r"^(\w+) = \[(.*?)\]$", text, flags=re.MULTILINE | re.DOTALL)
    values = {
        name: [double or single for double, single in re.findall(r'"(.*?)"|\'(.*?)\'', items)] for name, items in lists
    }
    extras = re.findall(
        r"^(\w+) =", text.split("[project.optional-dependencies]")[1].split("\n[")[0], flags=re.MULTILINE
    )
    return {name: values[name] for name in ("dependencies", *extras)}


def test_requirements_and_pyproject_have_the_same_bounds():
    lines = (line.split("#")[0].strip() for line in (REPO_ROOT / "requirements.txt").read_text().splitlines())
    groups = read_pyproject()
    assert sorted(filter(None, lines)) == sorted(sum(groups.values(), []))
    assert {"deepspeed", "data", "plots", "quickstart", "test"} <= groups.keys()


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
@pytest.mark.parametrize("program", ["-c", "internvl/train/internvl_chat_finetune.py", "tools/quickstart/digits.py"])
def test_a_library_that_is_too_old_is_named_in_one_sentence(program, tmp_path):
    install_metadata(tmp_path, "transformers", "4.57.6")
    words = ["-c", "import internvl"] if program == "-c" else [str(PACKAGE_DIR / program), "--help"]
    environment = {"PYTHONPATH": f"{tmp_path}:{PACKAGE_DIR}"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    *before, sentence = done.stderr.splitlines()
    assert "Versions that are too old: transformers 4.57.6 (required: >= 5.3). Update: " in sentence
    assert done.returncode == 1
    assert sentence.startswith("ImportError: " if program == "-c" else "error: ")
    assert program == "-c" or not before


@pytest.mark.parametrize("library", versions.OLDEST_VERSIONS)
def test_oldest_versions_are_accepted_and_older_ones_refused(library, monkeypatch):
    installed = dict(versions.OLDEST_VERSIONS)
    monkeypatch.setattr(versions, "version", installed.__getitem__)
    versions.require_supported_versions()
    installed[library] = "0.9"
    with pytest.raises(ImportError, match=f"{library} 0.9 .required: >= {versions.OLDEST_VERSIONS[library]}"):
        versions.require_supported_versions()


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
    if not ("remote_code." in module.name or module.name.endswith("liger_layers")):  # imported only where they can run
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
