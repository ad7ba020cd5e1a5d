"""No rank waits for ever: one that ends takes the others along, and one message says which and why."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from internvl.arguments.training import parse_args
from internvl.runtime.shutdown import read_ddp_timeout

PROGRAM = Path(__file__).parents[1] / "programs/faulty_ranks.py"
WITHOUT_A_WORD = r"error: rank {} ended without a word: killed, for instance where memory ran out, or crashed\n"
TRACE = r"Traceback \(most recent call last\):\n(  .*\n)+"
BUG = TRACE + r"KeyError: 'no such key'\nerror on rank {}: KeyError: 'no such key'\n"
# What gloo says of a connection that is gone depends on whether it was waiting, reading or writing.
BROKEN = r"RuntimeError: .*(Connection|Socket|[Bb]roken pipe).*\n"
LEFT = r"error: rank {} left the training, and took no part in what rank \d waited for: " + BROKEN
TIMED_OUT = r"RuntimeError: Timed out waiting \d+ms.*\n"
LATE = r"error: rank {} did not take part in what rank \d waited for: " + TIMED_OUT
GONE = r"error: rank 0 {}; rank 1 waited for it: "

# fault, rank -> status of that rank, all that is written, seconds until the last rank has ended
ENDS = {
    ("wrong input", 1): (1, r"error on rank 1: the picture is upside down\.\n", 9),
    ("wrong input", 0): (1, r"error on rank 0: the picture is upside down\.\n", 9),
    ("wrong input by all", -1): (1, r"error: the picture is upside down\.\n", 9),
    ("bug", 1): (1, BUG.format(1), 9),
    ("bad disk", 2): (1, r"error on rank 2: \[Errno 2\] No such file or directory: '/nowhere/file'\n", 9),
    ("out of memory", 1): (1, r"error on rank 1: MemoryError; fewer --dataloader_num_workers need less\.\n", 9),
    ("killed", 1): (-9, WITHOUT_A_WORD.format(1), 9),
    ("killed", 0): (-9, WITHOUT_A_WORD.format(0), 9),
    ("crashed", 1): (-11, WITHOUT_A_WORD.format(1), 9),
    ("exit without a word", 1): (0, WITHOUT_A_WORD.format(1), 9),
    ("exit", 1): (3, r"error: rank 1 left the training with exit status 3 while others were in it\n", 9),
    ("exit", 0): (3, GONE.format("left the training with exit status 3") + BROKEN, 9),
    ("exit in words", 1): (1, r"error on rank 1: no more\n", 9),
    ("exit by all", -1): (3, "", 9),
    ("leaves early", 1): (0, LEFT.format(1), 9),
    ("asleep", 1): (1, LATE.format(1), 18),
    ("asleep", 0): (1, LATE.format(0), 18),
    ("stopped", 1): ("stopped", LATE.format(1), 18),
    ("stopped", 0): ("stopped", GONE.format("does not answer any more") + f"({TIMED_OUT}|{BROKEN})", 30),
    ("absent", 1): ("absent", r"(.*\n)*error on rank 0: rank 0 of 3 did not find all others at .* in 6 s: .*\n", 30),
    ("nothing", 1): (0, "", 9),
}


TIMEOUTS = [
    (["--ddp_timeout", "7"], 7),
    (["--ddp_timeout=7", "--bf16", "True"], 7),
    (["--output_dir", "x"], 3600),
    (["--ddp_timeout", "soon"], 3600),  # the parser of all flags refuses it
]


@pytest.mark.parametrize(("argv", "seconds"), TIMEOUTS, ids=lambda value: str(value))
def test_the_timeout_is_known_before_the_other_flags(argv, seconds, tmp_path):
    assert read_ddp_timeout(argv) == seconds
    flags = parse_args([*argv, "--output_dir", str(tmp_path)]) if "soon" not in argv else None
    assert flags is None or flags[2].ddp_timeout == seconds


def test_timeouts_that_cannot_be(tmp_path):
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"output_dir": str(tmp_path), "ddp_timeout": 9}))
    assert read_ddp_timeout([str(file)]) == parse_args([str(file)])[2].ddp_timeout == 9
    assert read_ddp_timeout(["/nowhere/arguments.json"]) == 3600
    with pytest.raises(ValueError, match="--ddp_timeout 0 must be at least 1"):
        parse_args(["--output_dir", "x", "--ddp_timeout", "0"])


@pytest.fixture(scope="module")
def ends() -> dict[str, dict]:
    cases = {f"{fault} {rank}": (fault, rank, 3) for fault, rank in ENDS}
    command = [sys.executable, PROGRAM, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("fault", "rank"), ENDS, ids=lambda value: str(value))
def test_a_rank_that_ends_takes_the_others_along_and_one_message_names_it(ends, fault, rank):
    status, written, seconds = ENDS[fault, rank]
    end = ends[f"{fault} {rank}"]
    others = [status if rank == -1 or fault == "nothing" else 1] * 3
    expected = [status if number == rank else others[number] for number in range(3)]
    assert end["statuses"] == expected, end
    assert re.fullmatch(rf"\n?{written}", end["stderr"]), end["stderr"]
    assert end["seconds"] < seconds
