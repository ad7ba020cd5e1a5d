"""Check a machine before the first run: versions, kernels, numbers, training, speed.

    python internvl_chat/tools/gpu_check.py [--only PART,...] [--output FILE]

    versions    libraries, driver, GPUs, /dev/shm, compilers
    kernels     which attention, norm and optimizer kernels a model gets
    parity      loss and gradients of adapters on the GPU in fp32, autocast and bf16, beside the CPU in fp32
    training    a tiny model through the training program: without DeepSpeed, with ZeRO-2 and ZeRO-3, with QLoRA
    speed       throughput, MFU and peak memory of a step in the shapes of the 8B model, or 2B or 1B by free memory

It takes some minutes, needs no checkpoint, data or network, changes no settings and leaves nothing behind. Without a
GPU all parts run on the CPU with tiny models. Each check is a line of a table: passed, failed with the reason, or
skipped because something optional is missing. The exit status is 0 if no check failed. INTERNVL_TRACEBACK=1 shows
tracebacks and the output of libraries.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from internvl.command_line import exit_on_user_error, log_to_console
from internvl.tool_parser import ToolParser
from internvl.tools.machine_check.checks import CheckResult, run_checks

SCHEMA_VERSION = 1  # of the JSON file
MAX_TIMEOUT = 86_400  # seconds
SHARE_OF_A_RUN = 0.4  # of the part's time limit that a single training may take
EXIT_TIMEOUT = 30.0  # seconds from the last result of a part to the end of its process


class Part(NamedTuple):
    """Module below `internvl.tools.machine_check`, and the function that lists its checks."""

    module: str
    function: str
    needs_folder: bool = False  # takes a folder for its files, and the time limit of a single run


PARTS = {
    "versions": Part("machine", "list_version_checks"),
    "kernels": Part("machine", "list_kernel_checks"),
    "parity": Part("parity", "list_parity_checks"),
    "training": Part("training", "list_training_checks", needs_folder=True),
    "speed": Part("speed", "list_speed_checks"),
}


@exit_on_user_error
def main(argv=None):
    args = parse_args(argv)
    is_cuda = torch.cuda.is_available()
    device = f"CUDA devices: {torch.cuda.device_count()}" if is_cuda else "No CUDA device: tiny checks on the CPU."
    print(device, flush=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        for part in args.only:
            for result in run_part(part, Path(folder), args.timeout):
                print(format_result(result), flush=True)
                results.append(result)
    print(format_summary(results))
    if args.output:
        args.output.write_text(json.dumps(build_report(results), indent=1) + "\n")
    sys.exit(get_exit_status(results))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; `only` becomes a list of parts.

    Raises:
        ValueError: an unknown part, a time limit out of range, or an output file that cannot be new.
    """
    parser = ToolParser(__doc__)
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...", help="parts (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for each part (default: %(default)s)")
    args = parser.parse_args(argv)
    args.only = [name.strip() for name in args.only.split(",") if name.strip()]
    unknown = [name for name in args.only if name not in PARTS]
    if unknown or not args.only:
        names = ", ".join(unknown) or "(nothing)"
        raise ValueError(f"--only {names:.80} is invalid: expected some of {', '.join(PARTS)}, separated by commas.")
    if not 0 < args.timeout <= MAX_TIMEOUT:
        raise ValueError(f"--timeout {args.timeout:g} is invalid: expected seconds > 0 and <= {MAX_TIMEOUT}.")
    if args.output and (args.output.exists() or not args.output.absolute().parent.is_dir()):
        raise ValueError(f"--output {args.output} is invalid: expected a new file in an existing folder.")
    return args


# -- processes ---------------------------------------------------------------------------------------------------------


def run_part(part: str, folder: Path, timeout: float) -> Iterator[CheckResult]:
    """Run a part in its own process and yield its results as they come.

    A crash or a hanging kernel ends only this part, after which all its processes are killed.

    Args:
        folder: for temporary files.
        timeout: seconds for the part.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_results, args=(part, folder, timeout, sender))
    start = time.monotonic()
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, start + timeout - time.monotonic())):
            yield receiver.recv()
        yield CheckResult(part, part, "failed", reason=f"no further result within {timeout:g} s", seconds=timeout)
    except EOFError:  # the process has ended
        process.join(EXIT_TIMEOUT)
        if process.exitcode:
            reason = f"the process ended with status {process.exitcode}{read_last_line(folder / f'{part}.log')}"
            yield CheckResult(part, part, "failed", reason=reason, seconds=round(time.monotonic() - start, 3))
    finally:
        assert process.pid
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended, or not yet become a group
            process.kill()
        process.join()


def send_results(part: str, folder: Path, timeout: float, sender: Connection) -> None:
    """Run the checks of a part and send their results; the target of its process."""
    os.setsid()  # one group with all processes that it starts
    if os.environ.get("INTERNVL_TRACEBACK") != "1":
        with open(folder / f"{part}.log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    log_to_console()
    module, function, needs_folder = PARTS[part]
    list_checks = getattr(importlib.import_module(f"internvl.tools.machine_check.{module}"), function)
    arguments = (folder, timeout * SHARE_OF_A_RUN) if needs_folder else ()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny products take longer with threads, on a busy machine 20 times
    for result in run_checks(part, list_checks(device, *arguments)):
        sender.send(result)


def read_last_line(log: Path) -> str:
    """Return the last line of a log after a colon, empty if there is none."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last:.200}" if last else ""


# -- results -----------------------------------------------------------------------------------------------------------


def format_result(result: CheckResult) -> str:
    """Format a result as one line of the table."""
    found = result.reason or "; ".join(f"{name}: {format_value(value)}" for name, value in result.values.items())
    return f"{result.status:<8} {result.part:<9} {result.name:<33} {result.seconds:6.1f} s  {found}"


def format_value(value: Any) -> str:
    """Format a value of a result, numbers with three digits."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "none" if value is None else str(value)


def format_summary(results: list[CheckResult]) -> str:
    """Count the results by status."""
    counts = {status: sum(result.status == status for result in results) for status in ("passed", "failed", "skipped")}
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def build_report(results: list[CheckResult]) -> dict:
    """Build the content of the JSON file."""
    return {
        "schema": SCHEMA_VERSION,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "status": "failed" if get_exit_status(results) else "passed",
        "seconds": round(sum(result.seconds for result in results), 1),
        "checks": [vars(result) for result in results],
    }


def get_exit_status(results: list[CheckResult]) -> int:
    """Return 1 if a check failed, else 0."""
    return int(any(result.status == "failed" for result in results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are removed
    main()
