"""Time the command `internvl` beside a Python that does nothing.

    python tools/benchmark_startup.py [--turns 10]

Every turn runs all command lines, each in a new process. None of them imports torch. `CPU` is what a machine without
other work needs at most, also where others slow the turns down.
"""

import os
import shlex
import subprocess
import sys
import time

from internvl.command_line import exit_on_user_error
from internvl.tool_parser import ToolParser
from internvl.tools.benchmark.turns import compute_median_interval, format_interval

REFERENCE = "-c pass"
COMMAND_LINES = (
    REFERENCE,
    "-m internvl --version",
    "-m internvl --help",
    "-m internvl train --help",
    "-m internvl train --list",
    "-m internvl train --lerning_rate 1e-4",
    "-m internvl train internvl2.5/8b_vit_lor",
)


@exit_on_user_error
def main(argv=None):
    parser = ToolParser(__doc__)
    parser.add_argument("--turns", type=int, default=10, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.turns < 1:
        raise ValueError(f"--turns {args.turns} is invalid: expected an integer >= 1.")
    times = {line: [] for line in COMMAND_LINES}
    for turn in range(args.turns + 1):
        for line in COMMAND_LINES:
            measured = time_process([sys.executable, *shlex.split(line)])
            if turn:  # the first one reads files that are not yet in memory
                times[line].append(measured)
    print("milliseconds: median [95 % interval]")
    for line, values in times.items():
        wall, cpu = (
            compute_median_interval([1000 * value for value in column]) for column in zip(*values, strict=True)
        )
        print(f"python {line:44} {format_interval(wall, '.0f'):20} CPU {format_interval(cpu, '.0f')}")


def time_process(command: list[str]) -> tuple[float, float]:
    """Run a command; return its wall time and its CPU time in seconds, with those of its children."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


if __name__ == "__main__":
    main()
