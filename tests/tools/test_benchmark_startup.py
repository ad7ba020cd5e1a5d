"""tools/benchmark_startup.py runs every command line and prints its times."""

import re

import pytest

from internvl.tools.benchmark_startup import COMMAND_LINES, main


@pytest.mark.multiprocess
def test_every_command_line_has_its_times(capsys):
    main(["--turns", "1"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header == "milliseconds: median [95 % interval]"
    for line, row in zip(COMMAND_LINES, rows, strict=True):
        assert re.fullmatch(rf"python {re.escape(line)} +\d+ \[\d+, \d+\] +CPU \d+ \[\d+, \d+\]", row), row


def test_turns_are_checked():
    with pytest.raises(SystemExit, match="error: --turns 0 is invalid: expected an integer >= 1."):
        main(["--turns", "0"])
