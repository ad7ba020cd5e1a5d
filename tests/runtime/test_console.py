"""Nothing that happens to the console ends a program: no reader, a full disk, closed files."""

import os
import subprocess
import sys

import pytest
from helpers.paths import PACKAGE_DIR

pytestmark = pytest.mark.multiprocess
PRINT_MUCH = """
import logging, sys, time
from internvl.runtime.process import prepare_rank
prepare_rank()
from internvl.runtime.rank_monitor_server import write_stderr
logging.basicConfig(stream=sys.stdout)
for number in range(300):
    print("line", "x" * 1000)
    logging.error("line")
    write_stderr("line")
    sys.stderr.write("line\\n")
    time.sleep(0.001)
open(sys.argv[1], "w").write("finished")
"""
STREAMS = {
    "no reader": "python3 program file 2>&1 | head -1",
    "no reader of stderr": "python3 program file 2>&1 >/dev/null | true",
    "full disk": "python3 program file >/dev/full 2>&1",
    "unbuffered to a full disk": "python3 -u program file >/dev/full 2>&1",
    "closed": "python3 program file <&- >&- 2>&-",
    "closed stdout": "python3 program file >&-",
    "closed stdin and stderr": "python3 program file <&- 2>&- >/dev/null",
}


@pytest.mark.parametrize("command", STREAMS.values(), ids=STREAMS)
def test_a_program_finishes_without_its_console(tmp_path, command):
    (tmp_path / "program").write_text(PRINT_MUCH)
    env = os.environ | {"PYTHONPATH": str(PACKAGE_DIR), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert (tmp_path / "file").read_text() == "finished", "what is written to a console does not end in files"
