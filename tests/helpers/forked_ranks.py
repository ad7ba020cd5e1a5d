"""Start ranks by forking a process that has imported everything.

A launcher starts each rank from nothing: importing torch, transformers and DeepSpeed takes 8 CPU seconds, in which a
tiny model trains a hundred steps. A fork takes 0.1 s. Some tests use a launcher nevertheless, because nothing may
depend on how a rank was started.
"""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import psutil

TESTS = Path(__file__).parents[1]


class ForkedRanks:
    """Forked processes that run one program, as a launcher would start them.

    Args:
        command: the program and its flags.
        env: its environment variables, without those that name the rank.
        ranks: how many processes; a single one gets no variables of a launcher.
        port: where rank 0 listens.
        folder: receives the output of all ranks, in the files `stdout` and `stderr`.
    """

    def __init__(self, command: list[str], env: dict[str, str], ranks: int, port: str, folder: Path):
        self.command = command
        self.output_paths = [folder / "stdout", folder / "stderr"]
        for path in self.output_paths:
            path.touch()
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        launched = [world | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)] if ranks > 1 else [{}]
        environments = [env | {name: str(value) for name, value in variables.items()} for variables in launched]
        process_class = get_fork_server().Process
        self.processes = [
            process_class(target=_run_program, args=(command, environment, self.output_paths), daemon=False)
            for environment in environments
        ]
        for process in self.processes:
            process.start()

    def is_running(self) -> bool:
        """Return whether any rank is still running."""
        return any(process.exitcode is None for process in self.processes)

    def wait(self) -> subprocess.CompletedProcess:
        """Wait for all ranks; when one fails, terminate the others (like torchrun)."""
        failed_status = 0
        while self.is_running():
            if not failed_status and (failed_status := self._find_failed_status()):
                for process in self.processes:
                    process.terminate()
            time.sleep(0.01)
        status = failed_status or self._find_failed_status()
        return subprocess.CompletedProcess(self.command, status, *(path.read_text() for path in self.output_paths))

    def _find_failed_status(self) -> int:
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def kill(self) -> None:
        """Kill (SIGKILL) all ranks and the processes that they started."""
        ranks = [psutil.Process(process.pid) for process in self.processes if process.exitcode is None]
        for process in [*ranks, *(child for rank in ranks for child in rank.children(recursive=True))]:
            process.kill()
        for process in self.processes:
            process.join()


@functools.cache
def get_fork_server():
    """Start, once, the process that ranks are forked from."""
    context, before = multiprocessing.get_context("forkserver"), os.environ.copy()
    context.set_forkserver_preload(["helpers.preloaded_imports"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent / "internvl_chat"), str(TESTS)])
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def _run_program(command: list[str], env: dict[str, str], output_paths: list[Path]) -> None:
    """Run a program in this fork as if just started."""
    assert "helpers.preloaded_imports" in sys.modules, "not forked from the process that has imported everything"
    os.environ.clear()
    os.environ.update(env)
    for descriptor, path in enumerate(output_paths, start=1):  # 1: stdout, 2: stderr
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    multiprocessing.set_start_method(None, force=True)  # processes of the program start in the default way
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
