"""Workflows, issue forms, pre-commit hooks and release notes: they are valid and name only what exists."""

import re
import subprocess

import pytest
import yaml
from helpers.environments import layer_environment, make_layer_or_skip
from helpers.paths import REPO_ROOT
from helpers.scripts import load_script
from packaging.requirements import Requirement
from versions import ENVIRONMENTS, read_requirements

from internvl.commands.table import COMMANDS

WORKFLOWS = sorted((REPO_ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((REPO_ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"))  # not config.yml
HOOKS = REPO_ROOT / ".pre-commit-config.yaml"
LAYER = ("workflows", ["check-jsonschema>=0.33", "pre-commit>=4.0"])
# Programs that the runners, setup.sh, pip or actions/checkout bring.
INSTALLED_PROGRAMS = {"bash", "gh", "git", "pip", "pre-commit", "pyrefly", "python", "source", "test"}


def read_yaml(path) -> dict:
    """Read a YAML file whose scalars stay texts; `on` is one."""
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)


JOBS = {f"{path.stem}-{name}": job for path in WORKFLOWS for name, job in read_yaml(path)["jobs"].items()}
HOOK_ROWS = read_yaml(HOOKS)["repos"][0]["hooks"]


def id_of_hook(hook: dict) -> str:
    return hook["id"]


# -- what they name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_commands_of_workflows_exist(job):
    lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    assert lines
    for line in lines:
        program, *words = line.split()
        assert program in INSTALLED_PROGRAMS or (REPO_ROOT / program).is_file(), line
        paths = [word for word in words if re.fullmatch(r"[.\w/-]+\.(py|sh)", word)]
        assert all((REPO_ROOT / path).is_file() for path in paths), line


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_jobs_have_a_time_limit(job):
    assert 5 <= int(job["timeout-minutes"]) <= 240


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_name_commands_and_files_that_exist(path):
    text = path.read_text(encoding="utf-8")
    assert {*re.findall(r"`internvl ([\w-]+)", text)} <= COMMANDS.keys()
    assert all((REPO_ROOT / name).is_file() for name in re.findall(r"`(\w+/[\w/.]+)`", text))


def test_the_version_matrix_is_that_of_the_tests():
    job = JOBS["tests-versions"]
    assert job["strategy"]["matrix"]["environment"] == list(ENVIRONMENTS)
    (pythons,) = [step["with"]["python-version"].split() for step in job["steps"] if "with" in step]
    assert {environment.python for environment in ENVIRONMENTS.values()} - {None} <= set(pythons)


def test_fast_tests_run_on_every_supported_python():
    pythons = JOBS["tests-fast"]["strategy"]["matrix"]["python"]
    assert (pythons[0], pythons[-1]) == (ENVIRONMENTS["floor"].python, ENVIRONMENTS["newest"].python)
    assert pythons == [f"3.{minor}" for minor in range(10, 10 + len(pythons))]


def test_a_bug_report_requires_the_output_of_doctor():
    (field,) = [field for field in read_yaml(FORMS[0])["body"] if field.get("id") == "doctor"]
    assert "`internvl doctor`" in field["attributes"]["label"] and field["validations"] == {"required": "true"}


@pytest.mark.parametrize("hook", HOOK_ROWS, ids=id_of_hook)
def test_hooks_have_the_versions_of_the_tests(hook):
    (requirement,) = map(Requirement, hook["additional_dependencies"])
    bounds = {req.name: req.specifier for req in read_requirements()}
    assert requirement.specifier == bounds.get(requirement.name, requirement.specifier)
    assert requirement.name == hook["entry"].split()[0]


# -- release notes -----------------------------------------------------------------------------------------------------


def load_release_notes():
    return load_script(REPO_ROOT / ".github/release_notes.py")


CHANGELOG = """# Changelog

## 0.3.0 (unreleased)

Soon.

## 0.2.0 (2026-12-01)

Notes of two.

### Data

- ## is no heading here

## 0.1.0 (2026-10-01)

First.

## 0.0.1 (2026-09-01)
"""


def test_release_notes_are_the_section_of_a_version():
    extract = load_release_notes().extract_release_notes
    assert extract(CHANGELOG, "0.2.0") == "Notes of two.\n\n### Data\n\n- ## is no heading here"
    assert extract(CHANGELOG, "0.1.0") == "First."


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("0.3.0", "CHANGELOG.md: expected the date of version 0.3.0 (YYYY-MM-DD), got (unreleased)."),
        ("v0.2.0", "CHANGELOG.md has no section for version 'v0.2.0': it has 0.3.0, 0.2.0, 0.1.0, 0.0.1."),
        ("0.0.1", "CHANGELOG.md: the section of version 0.0.1 is empty."),
    ],
)
def test_a_version_that_cannot_be_released_is_one_sentence(version, sentence):
    with pytest.raises(ValueError) as error:
        load_release_notes().extract_release_notes(CHANGELOG, version)
    assert str(error.value) == sentence


def test_the_changelog_has_the_version_of_the_package():
    from internvl import __version__

    module = load_release_notes()
    text = module.CHANGELOG.read_text(encoding="utf-8").replace("(unreleased)", "(2026-12-01)")
    assert module.extract_release_notes(text, __version__).count("\n### ") > 3


# -- their own programs ------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_workflows_and_forms_have_githubs_schema():
    python = make_layer_or_skip(*LAYER)
    for schema, paths in (("github-workflows", WORKFLOWS), ("github-issue-forms", FORMS)):
        command = [python, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *paths]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.e2e
def test_hooks_fix_what_is_staged(tmp_path):
    """Run all hooks in a repository with a line that ruff removes, one that it formats, and a notebook's output."""
    python = make_layer_or_skip(*LAYER)
    notebook = (REPO_ROOT / "examples/finetune_1b.ipynb").read_text()
    files = {
        HOOKS.name: HOOKS.read_text(),
        "pyproject.toml": (REPO_ROOT / "pyproject.toml").read_text(),
        "a.py": "import os\nx = {'a':1}\n",
        "b.ipynb": notebook.replace('"execution_count": null', '"execution_count": 7', 1),
    }
    folder = tmp_path / "repository"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    env = layer_environment(python, PRE_COMMIT_HOME=str(tmp_path / "pre-commit"))

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)

    assert run("git", "init", "--quiet").returncode == run("git", "add", ".").returncode == 0
    first = run(str(python), "-m", "pre_commit", "run", "--all-files")
    assert (folder / "a.py").read_text() == 'x = {"a": 1}\n', first.stdout
    assert (folder / "b.ipynb").read_text() == notebook
    assert first.returncode == 1
    assert run("git", "add", ".").returncode == 0
    second = run(str(python), "-m", "pre_commit", "run", "--all-files")
    assert second.returncode == 0, second.stdout
