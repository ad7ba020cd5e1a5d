"""When one rank fails, all ranks exit, and one message names it."""

import json
import re
import subprocess
import sys

import pytest
from helpers.paths import REPO_ROOT

from internvl.arguments.training import parse_args
from internvl.runtime.shutdown import read_ddp_timeout

PROGRAM = REPO_ROOT / "tests/programs/faulty_ranks.py"
KILLED = r"error: rank {} exited without an error report; probably killed \(out-of-memory killer\?\)\n"
TRACEBACK = r"Traceback \(most recent call last\):\n(  .*\n)+"
BUG = TRACEBACK + r"KeyError: 'no such key'\nerror: rank {} failed: KeyError: 'no such key'\n"
# gloo's message about a lost connection depends on whether it was waiting, reading or writing.
CONNECTION_LOST = r"RuntimeError: .*(Connection|Socket|[Bb]roken pipe).*\n"
EXITED_EARLY = r"error: rank {} exited and did not join a collective that rank \d waited for: " + CONNECTION_LOST
TIMED_OUT = r"RuntimeError: Timed out waiting \d+ms.*\n"
LATE = r"error: rank {} did not join a collective that rank \d waited for: " + TIMED_OUT
RANK_0_LOST = r"error: rank 0 {}; rank 1 waited for it: "

# fault, faulty rank (-1: all) -> its exit status, all of stderr, seconds within which all ranks have exited
OUTCOMES = {
    ("invalid input", 1): (1, r"error: rank 1 failed: the image is upside down\.\n", 9),
    ("invalid input", 0): (1, r"error: rank 0 failed: the image is upside down\.\n", 9),
    ("invalid input on all ranks", -1): (1, r"error: the image is upside down\.\n", 9),
    ("bug", 1): (1, BUG.format(1), 9),
    ("missing file", 2): (1, r"error: rank 2 failed: \[Errno 2\] No such file or directory: '/nowhere/file'\n", 9),
    ("out of memory", 1): (
        1,
        r"error: rank 1 failed: MemoryError; to use less memory: fewer --dataloader_num_workers\.\n",
        9,
    ),
    ("killed", 1): (-9, KILLED.format(1), 9),
    ("killed", 0): (-9, KILLED.format(0), 9),
    ("crashed", 1): (-11, KILLED.format(1), 9),
    ("exit without report", 1): (0, KILLED.format(1), 9),
    ("exit", 1): (3, r"error: rank 1 exited with exit status 3 while other ranks were still training\n", 9),
    ("exit", 0): (3, RANK_0_LOST.format("exited with exit status 3") + CONNECTION_LOST, 9),
    ("exit with message", 1): (1, r"error: rank 1 failed: no more\n", 9),
    ("exit on all ranks", -1): (3, "", 9),
    ("early end", 1): (0, EXITED_EARLY.format(1), 9),
    ("asleep", 1): (1, LATE.format(1), 18),
    ("asleep", 0): (1, LATE.format(0), 18),
    ("stopped", 1): ("stopped", LATE.format(1), 18),
    ("stopped", 0): ("stopped", RANK_0_LOST.format("does not respond") + f"({TIMED_OUT}|{CONNECTION_LOST})", 30),
    ("absent", 1): (
        "absent",
        r"(.*\n)*error: rank 0 failed: rank 0 of 3: not all ranks connected to .* within 6 s: .*\n",
        30,
    ),
    ("none", 1): (0, "", 9),
}


DDP_TIMEOUTS = [
    (["--ddp_timeout", "7"], 7),
    (["--ddp_timeout=7", "--bf16", "True"], 7),
    (["--output_dir", "x"], 3600),
    (["--ddp_timeout", "soon"], 3600),  # rejected later, by the parser of all flags
]


@pytest.mark.parametrize(("argv", "seconds"), DDP_TIMEOUTS, ids=lambda value: str(value))
def test_ddp_timeout_is_read_before_the_other_flags(argv, seconds, tmp_path):
    assert read_ddp_timeout(argv) == seconds
    flags = parse_args([*argv, "--output_dir", str(tmp_path)]) if "soon" not in argv else None
    assert flags is None or flags[2].ddp_timeout == seconds


def test_ddp_timeout_of_an_arguments_file_and_invalid_values(tmp_path):
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"output_dir": str(tmp_path), "ddp_timeout": 9}))
    assert read_ddp_timeout([str(file)]) == parse_args([str(file)])[2].ddp_timeout == 9
    assert read_ddp_timeout(["/nowhere/arguments.json"]) == 3600
    with pytest.raises(ValueError, match="--ddp_timeout 0 "):
        parse_args(["--output_dir", "x", "--ddp_timeout", "0"])


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict]:
    """Run all cases in one program; return their outcomes by name."""
    cases = {f"{fault} {rank}": (fault, rank, 3) for fault, rank in OUTCOMES}
    command = [sys.executable, PROGRAM, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("fault", "rank"), OUTCOMES, ids=lambda value: str(value))
def test_a_failed_rank_ends_all_ranks_with_one_message(outcomes, fault, rank):
    status, stderr, seconds = OUTCOMES[fault, rank]
    outcome = outcomes[f"{fault} {rank}"]
    others = [status if rank == -1 or fault == "none" else 1] * 3
    expected = [status if number == rank else others[number] for number in range(3)]
    assert outcome["statuses"] == expected, outcome
    assert re.fullmatch(rf"\n?{stderr}", outcome["stderr"]), outcome["stderr"]
    assert outcome["seconds"] < seconds
