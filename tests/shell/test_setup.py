"""setup.sh: once, then silent and instant; what is missing is said in one sentence."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.training_runs import ROOT

TOOLS = ("bash", "dirname", "df", "awk", "tail", "mkdir", "rm", "realpath")
SHOW = 'source "$0/shell/setup.sh" && echo "$VIRTUAL_ENV $(command -v python3) $PYTHONPATH $-"'


@pytest.fixture
def repository(tmp_path):
    """A checkout whose requirements are already met: installing it is real and short."""
    folder = tmp_path / "a checkout"
    (folder / "shell").mkdir(parents=True)
    (folder / "internvl_chat").mkdir()
    shutil.copy(ROOT / "shell/setup.sh", folder / "shell")
    (folder / "requirements.txt").write_text("# nothing\n")
    return folder


@pytest.fixture
def tools(tmp_path):
    """A PATH that holds only chosen programs."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    python = Path(sys.base_prefix) / "bin/python3"
    (folder / "python3").symlink_to(python)
    (folder / "c++").symlink_to("/bin/true")
    return folder


def setup(repository, script=SHOW, **variables):
    env = {"PATH": os.environ["PATH"], "HOME": str(repository)} | {k: str(v) for k, v in variables.items()}
    return subprocess.run(
        ["/bin/bash", "-c", script, str(repository)], cwd="/", env=env, capture_output=True, text=True
    )


def python(folder, text):
    """Put a Python of our making on a PATH."""
    (folder / "python3").unlink()
    (folder / "python3").write_text(f"#!/bin/bash\n{text}\n")
    (folder / "python3").chmod(0o755)


def one_sentence(done, *words):
    assert done.returncode == 1
    assert done.stderr.startswith("setup.sh: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_once_then_silent_and_instant(repository, tools):
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
    assert not set("eu") & set(second.stdout.split()[-1]), "no shell option is set for who sources it"

    twice = setup(repository, f'source "$0/shell/setup.sh"; {SHOW}', PATH=tools)
    assert twice.stdout == first.stdout, "sourcing again changes nothing"

    (repository / "requirements.txt").write_text("# something else\n")
    assert "once" in setup(repository, PATH=tools).stderr, "new requirements are installed"
    moved = repository.rename(repository.with_name("moved"))
    again = setup(moved, PATH=tools)
    assert again.stdout.startswith(str(moved / ".venv")), "a moved environment is repaired"
    assert again.stderr.count("\n") == 1


def test_what_is_newly_required_is_installed_from_a_shell_in_which_the_environment_is_active(repository):
    more = 'echo "# more" >>"$0/requirements.txt"'
    done = setup(repository, f'source "$0/shell/setup.sh"; {more}; {SHOW}')
    assert done.returncode == 0 and done.stderr.count("\n") == 2, done.stderr
    assert done.stdout.startswith(f"{repository}/.venv {repository}/.venv/bin/python3 ")
    assert setup(repository).stderr == "", "it is installed"


def test_two_jobs_install_one_after_the_other(repository):
    with (repository / "requirements.txt").open("r+") as file:
        subprocess.run(["flock", str(file.fileno())], pass_fds=[file.fileno()], check=True)
        job = subprocess.Popen(
            ["/bin/bash", repository / "shell/setup.sh"], stderr=subprocess.PIPE, env=os.environ | {"INTERNVL_VENV": ""}
        )
        assert b"waiting" in job.stderr.readline()
        (repository / ".venv/bin").mkdir(parents=True)
        (repository / ".venv/bin/activate").touch()
        (repository / ".venv/.internvl").write_text(f"{repository}/.venv\n# nothing")
    assert job.wait(timeout=20) == 0, "the other job has installed: nothing is left to do"
    assert job.stderr.read() == b""
    job.stderr.close()


def test_pip_fails(repository, tools):
    (repository / "requirements.txt").write_text("./no-such-folder\n")
    done = setup(repository, PATH=tools)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("setup.sh: pip could not install")
    assert "no-such-folder" in done.stderr
    assert setup(repository, PATH=tools).returncode == 1, "nor is it taken for done the next time"


def test_no_compiler(repository, tools):
    (tools / "c++").unlink()
    one_sentence(setup(repository, PATH=tools), "g++", "DeepSpeed")


@pytest.mark.parametrize("answer", ["exit 127", "exit 1"])
def test_no_python(repository, tools, answer):
    python(tools, answer)
    one_sentence(setup(repository, PATH=tools), "no Python >= 3.10")


@pytest.mark.parametrize(("asked", "word"), [("ensurepip", "-venv"), ("Python.h", "-dev")])
def test_incomplete_python(repository, tools, asked, word):
    python(tools, f'[[ $* == *{asked}* ]] && exit 1; exec {sys.base_prefix}/bin/python3 "$@"')
    one_sentence(setup(repository, PATH=tools), word, "apt-get install")


def test_no_disk(repository, tools):
    (tools / "df").unlink()
    (tools / "df").write_text('#!/bin/bash\nprintf "head\\nx 20000000 1 3145728 9%% /\\n"\n')
    (tools / "df").chmod(0o755)
    one_sentence(setup(repository, PATH=tools), "10 GB", "3 GB are free")


def test_failure_reaches_a_script_that_sources_it(repository, tools):
    (tools / "c++").unlink()
    script = 'set -euo pipefail; source "$0/shell/setup.sh"; echo went on'
    assert (setup(repository, script, PATH=tools).stdout) == ""


def test_active_environment(repository):
    """INTERNVL_VENV=none: the interpreter on PATH, nothing made, nothing said."""
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    for _ in range(2):
        start = time.monotonic()
        done = setup(ROOT, INTERNVL_VENV="none", PATH=path)
        seconds = time.monotonic() - start
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert f"{sys.prefix}/bin/python3 {ROOT}/internvl_chat" in done.stdout
    assert seconds < 0.3
