"""setup.sh installs once, and reports missing requirements in one sentence."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.paths import REPO_ROOT

COMMANDS = ("bash", "dirname", "awk", "tail", "mkdir", "rm", "realpath")
PRINT_STATE = 'source "$0/shell/setup.sh" && echo "$VIRTUAL_ENV $(command -v python3) $PYTHONPATH $-"'


@pytest.fixture
def repository(tmp_path):
    """Make a checkout without requirements: a real but short installation."""
    folder = tmp_path / "a checkout"
    (folder / "shell").mkdir(parents=True)
    (folder / "internvl_chat").mkdir()
    shutil.copy(REPO_ROOT / "shell/setup.sh", folder / "shell")
    (folder / "requirements.txt").write_text("# no packages\n")
    return folder


@pytest.fixture
def tools(tmp_path):
    """Make a PATH folder with only `COMMANDS`, Python, a compiler and a `df` that finds enough free space."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).symlink_to(shutil.which(name))
    python = Path(sys.base_prefix) / "bin/python3"
    (folder / "python3").symlink_to(python)
    (folder / "c++").symlink_to("/bin/true")
    report_free_space(folder, gigabytes=20)
    return folder


def report_free_space(folder, gigabytes):
    """Put a `df` into a PATH folder: the tests do not depend on this machine's disk."""
    (folder / "df").write_text(f'#!/bin/bash\nprintf "head\\nx 90000000 1 {gigabytes * 2**20} 9%% /\\n"\n')
    (folder / "df").chmod(0o755)


def setup(repository, script=PRINT_STATE, **variables):
    env = {"PATH": os.environ["PATH"], "HOME": str(repository)} | {k: str(v) for k, v in variables.items()}
    return subprocess.run(
        ["/bin/bash", "-c", script, str(repository)], cwd="/", env=env, capture_output=True, text=True
    )


def replace_python(folder, text):
    """Replace the Python on PATH by a script."""
    (folder / "python3").unlink()
    (folder / "python3").write_text(f"#!/bin/bash\n{text}\n")
    (folder / "python3").chmod(0o755)


def assert_one_sentence(done, *words):
    assert done.returncode == 1
    assert done.stderr.startswith("setup.sh: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.e2e
def test_the_second_call_is_silent_and_instant(repository, tools):
    first = setup(repository, PATH=tools)
    env = repository / ".venv"
    expected = f"{env} {env}/bin/python3 {repository}/internvl_chat "
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(expected)
    assert first.stderr.count("\n") == 1
    assert "once" in first.stderr

    start = time.monotonic()
    second = setup(repository, PATH=tools)
    assert time.monotonic() - start < 0.3
    assert (second.stdout, second.stderr) == (first.stdout, "")
    assert not set("eu") & set(second.stdout.split()[-1]), "setup.sh sets no shell option"

    twice = setup(repository, f'source "$0/shell/setup.sh"; {PRINT_STATE}', PATH=tools)
    assert twice.stdout == first.stdout, "sourcing again changes nothing"

    (repository / "requirements.txt").write_text("# something else\n")
    python = (env / "bin/python3").lstat().st_ctime_ns
    assert "once" in setup(repository, PATH=tools).stderr, "new requirements are installed"
    assert (env / "bin/python3").lstat().st_ctime_ns == python, "a running Python is not replaced"
    moved = repository.rename(repository.with_name("moved"))
    again = setup(moved, PATH=tools)
    assert again.stdout.startswith(str(moved / ".venv")), "a moved environment is repaired"
    assert again.stderr.count("\n") == 1


@pytest.mark.e2e
def test_new_requirements_are_installed_while_the_environment_is_active(repository, tools):
    path = f"{tools}:{os.environ['PATH']}"
    more = 'echo "# more" >>"$0/requirements.txt"'
    done = setup(repository, f'source "$0/shell/setup.sh"; {more}; {PRINT_STATE}', PATH=path)
    assert done.returncode == 0 and done.stderr.count("\n") == 2, done.stderr
    assert done.stdout.startswith(f"{repository}/.venv {repository}/.venv/bin/python3 ")
    assert setup(repository, PATH=path).stderr == "", "already installed"


def test_a_second_job_waits_for_the_installation(repository):
    (repository / ".venv").mkdir()
    with (repository / ".venv/.internvl-lock").open("w") as file:
        subprocess.run(["flock", str(file.fileno())], pass_fds=[file.fileno()], check=True)
        job = subprocess.Popen(
            ["/bin/bash", repository / "shell/setup.sh"], stderr=subprocess.PIPE, env=os.environ | {"INTERNVL_VENV": ""}
        )
        assert b"waiting" in job.stderr.readline()
        (repository / ".venv/bin").mkdir()
        (repository / ".venv/bin/activate").touch()
        (repository / ".venv/.internvl").write_text(f"{repository}/.venv\n# no packages")
    assert job.wait(timeout=20) == 0, "the other job has installed everything"
    assert job.stderr.read() == b""
    job.stderr.close()


@pytest.mark.e2e
def test_a_failure_of_pip_is_not_stamped_as_installed(repository, tools):
    (repository / "requirements.txt").write_text("./no-such-folder\n")
    done = setup(repository, PATH=tools)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("setup.sh: pip could not install")
    assert "no-such-folder" in done.stderr
    assert setup(repository, PATH=tools).returncode == 1, "it fails again the next time"


def test_flash_attn_is_compiled_once_and_only_on_request(repository):
    """The environment's Python records its arguments; its pip fails."""
    env = repository / ".venv"
    (env / "bin").mkdir(parents=True)
    (env / "bin/activate").touch()
    (env / ".internvl").write_text(f"{env}\n# no packages")
    (env / "bin/python3").write_text('#!/bin/bash\necho "$*" >>"${0%/*}/calls"; echo no compiler; exit 1\n')
    (env / "bin/python3").chmod(0o755)
    calls = env / "bin/calls"
    for value in ("", "0"):
        assert setup(repository, INTERNVL_FLASH_ATTN=value).stderr == "" and not calls.exists()
    done = setup(repository, INTERNVL_FLASH_ATTN=1)
    assert done.returncode == 0, "PyTorch's attention is used"
    assert [line.split(" (")[0] for line in done.stderr.splitlines()] == [
        "setup.sh: compiling flash-attn",
        f"setup.sh: compiling flash-attn failed: read {env}/flash-attn.log and delete it to try again",
    ]
    assert (env / "flash-attn.log").read_text() == "no compiler\n"
    num_calls = len(calls.read_text().splitlines())
    assert setup(repository, INTERNVL_FLASH_ATTN=1).stderr == "" and len(calls.read_text().splitlines()) == num_calls


def test_missing_compiler(repository, tools):
    (tools / "c++").unlink()
    assert_one_sentence(setup(repository, PATH=tools), "g++", "DeepSpeed")


@pytest.mark.parametrize("answer", ["exit 127", "exit 1"])
def test_missing_python(repository, tools, answer):
    replace_python(tools, answer)
    assert_one_sentence(setup(repository, PATH=tools), "no Python >= 3.10")


@pytest.mark.parametrize(("asked", "word"), [("ensurepip", "-venv"), ("Python.h", "-dev")])
def test_incomplete_python(repository, tools, asked, word):
    replace_python(tools, f'[[ $* == *{asked}* ]] && exit 1; exec {sys.base_prefix}/bin/python3 "$@"')
    assert_one_sentence(setup(repository, PATH=tools), word, "apt-get install")


def test_too_little_disk_space(repository, tools):
    report_free_space(tools, gigabytes=3)
    assert_one_sentence(setup(repository, PATH=tools), "10 GB", "3 GB are free")


def test_a_failure_ends_a_script_that_sources_setup(repository, tools):
    (tools / "c++").unlink()
    script = 'set -euo pipefail; source "$0/shell/setup.sh"; echo continued'
    assert (setup(repository, script, PATH=tools).stdout) == ""


def test_internvl_venv_none_uses_the_active_environment():
    """Nothing is created and nothing is printed."""
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    for _ in range(2):
        start = time.monotonic()
        done = setup(REPO_ROOT, INTERNVL_VENV="none", PATH=path)
        seconds = time.monotonic() - start
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert f"{sys.prefix}/bin/python3 {REPO_ROOT}/internvl_chat" in done.stdout
    assert seconds < 0.3


def test_an_installed_package_needs_no_setup(tmp_path):
    """pip has installed it: neither a compiler nor requirements.txt is there, and PYTHONPATH stays."""
    package = tmp_path / "site-packages/internvl"
    (package / "shell").mkdir(parents=True)
    shutil.copy(REPO_ROOT / "shell/setup.sh", package / "shell")
    (package / "__init__.py").touch()
    script = 'source "$0/shell/setup.sh" && echo "<${PYTHONPATH-unset}>"'
    done = setup(package, script, CXX="no-such-compiler")
    assert (done.returncode, done.stdout, done.stderr) == (0, "<unset>\n", "")
    assert sorted(path.name for path in package.iterdir()) == ["__init__.py", "shell"]
