"""The command `internvl`: its table, its help, misspelled names, and what starting it costs."""

import os
import subprocess
import sys

import pytest
from helpers.evaluation_runs import write_evaluation_meta
from helpers.paths import PACKAGE_DIR, REPO_ROOT

from internvl import __version__
from internvl.__main__ import main
from internvl.commands.table import COMMANDS, CONVERSIONS
from internvl.launchers import find_free_port

ROWS = {f"internvl {name}": command for name, command in COMMANDS.items()}
ROWS |= {f"internvl convert {name}": command for name, command in CONVERSIONS.items()}


def run(*argv: str) -> str | int | None:
    """Run the command here; return its exit status or error message."""
    try:
        return main(list(argv))
    except SystemExit as error:
        return error.code


@pytest.fixture(autouse=True)
def command_line(monkeypatch):
    """Restore `sys.argv`, which the command sets for argparse."""
    monkeypatch.setattr(sys, "argv", ["internvl"])


def test_help_lists_every_command(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert run(*argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "usage: internvl COMMAND ..."
        for name, command in COMMANDS.items():
            assert any(line.split() == [name, *command.summary.split()] for line in lines)
        assert max(map(len, lines)) <= 80
    assert run("convert") == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in CONVERSIONS)


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(capsys, flag):
    assert run(flag) == 0
    assert capsys.readouterr().out == f"internvl {__version__}\n"


@pytest.mark.parametrize("name", [name for name, command in ROWS.items() if not command.is_rank])
def test_a_command_describes_itself_by_its_own_name(capsys, name):
    assert run(*name.split()[1:], "--help") in (0, None)
    check_help(name, capsys.readouterr().out)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", [name for name, command in ROWS.items() if command.is_rank])
def test_a_command_that_handles_signals_describes_itself(name):
    command = [sys.executable, "-m", *name.split(), "--help"]
    check_help(name, subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def check_help(name: str, text: str) -> None:
    """Check the help of a command; an example begins with its name."""
    assert text.startswith(f"usage: {name} ")
    assert name == "internvl convert" or f"\n    {name}" in text
    assert "python tools/" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["mrege", "a"], "error: unknown command: 'mrege'; did you mean internvl merge?"),
        (["checkdata"], "error: unknown command: 'checkdata'; did you mean internvl check-data?"),
        (["frobnicate"], "error: unknown command: 'frobnicate'; `internvl --help` lists all commands."),
        (["--verbose"], "error: unknown command: '--verbose'; `internvl --help` lists all commands."),
        (["convert", "tohf"], "error: unknown command: 'tohf'; did you mean internvl convert to-hf?"),
        (["convert", "8bit"], "error: unknown command: '8bit'; `internvl convert --help` lists all commands."),
    ],
)
def test_an_unknown_command_names_the_nearest(argv, message):
    assert run(*argv) == message


def test_a_command_may_have_an_underscore(capsys):
    assert run("check_data", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: internvl check-data ")


def test_an_error_of_a_tool_is_one_line(tmp_path):
    assert run("inspect", str(tmp_path / "nothing")).startswith("error: ")
    assert run("merge", str(tmp_path), str(tmp_path / "out")).startswith("error: no checkpoint in ")


@pytest.mark.multiprocess
def test_help_and_errors_import_no_library():
    """torch and transformers take seconds."""
    command_lines = [
        "--help",
        "--version",
        "mrege",
        "convert",
        "train --help",
        "train --list 8b",
        "train --lerning_rate 1",
    ]
    command_lines += ["train internvl2.5/8b_vit_lor", "train --config none.yaml"]
    code = f"""
import sys
from internvl.__main__ import main
for line in {command_lines}:
    try:
        main(line.split())
    except SystemExit as error:
        print(error.code)
print(sorted({{"torch", "transformers", "numpy"}} & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n"), done.stdout[-500:]


@pytest.mark.multiprocess
def test_a_missing_package_is_one_line(tmp_path):
    """As in an environment without torch, of which the installed package knows nothing."""
    code = "import sys; sys.modules['torch'] = None; from internvl.__main__ import main; main(['merge', 'a', 'b'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "error: internvl merge requires the package torch, which is not installed; "
        "`internvl doctor` lists what is installed.\n"
    )


@pytest.mark.multiprocess
def test_the_module_and_its_exit_status(tmp_path):
    command = [sys.executable, "-m", "internvl", "inspect", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.multiprocess
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_the_command_silently(unbuffered):
    """As `internvl --help | head -1` may."""
    reader, writer = os.pipe()
    os.close(reader)
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, "-m", "internvl", "--help"], stdout=writer, stderr=subprocess.PIPE, env=env)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.multiprocess
def test_evaluation_by_several_ranks(tiny_inputs, tmp_path):
    meta, output = write_evaluation_meta(tiny_inputs, tmp_path), tmp_path / "results"
    ranks = [REPO_ROOT / "shell/torchrun.py", "--nproc_per_node=2", f"--master_port={find_free_port()}"]
    command = [*ranks, "-m", "internvl", "evaluate", tiny_inputs / "model", meta, "--output", output]
    env = os.environ | {"PYTHONPATH": str(PACKAGE_DIR), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    flags = ["--eval_max_new_tokens", "2", "--seed", "1"]
    done = subprocess.run([sys.executable, *command, *flags], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((output / "predictions.jsonl").read_text().splitlines()) == 4
