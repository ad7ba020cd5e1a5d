"""Ranks as processes that are forked from one which has imported everything: a run begins in a tenth of a second.

Started by a launcher, each rank imports torch, transformers and DeepSpeed anew, 8 seconds of a core, in which a tiny
model trains a hundred steps. Some runs are started so nevertheless: nothing may depend on how a rank came to be.
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


class Ranks:
    """Processes that each run a program, as its launcher would start it.

    Args:
        command: the program and its flags.
        env: all its variables, but those that tell it its rank.
        folder: where it says what it says: `stdout` and `stderr`, of all ranks.
    """

    def __init__(self, command: list[str], env: dict[str, str], ranks: int, port: str, folder: Path):
        self.command, self.said = command, [folder / "stdout", folder / "stderr"]
        for file in self.said:
            file.touch()
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        places = [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)] if ranks > 1 else [{}]
        variables = [env | {name: str(value) for name, value in place.items()} for place in places]
        make = server().Process
        self.processes = [make(target=_run, args=(command, own, self.said), daemon=False) for own in variables]
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def wait(self) -> subprocess.CompletedProcess:
        """Until all have ended; when one fails, the others are told to end, as torchrun does."""
        failed = 0
        while self.running():
            if not failed and (failed := self._failed()):
                for process in self.processes:
                    process.terminate()
            time.sleep(0.01)
        done = failed or self._failed()
        return subprocess.CompletedProcess(self.command, done, *(file.read_text() for file in self.said))

    def _failed(self) -> int:
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def kill(self) -> None:
        """End all, and what they have started, without a warning."""
        parents = [psutil.Process(process.pid) for process in self.processes if process.exitcode is None]
        for member in [*parents, *(child for parent in parents for child in parent.children(recursive=True))]:
            member.kill()
        for process in self.processes:
            process.join()


@functools.cache
def server():
    """What forks from a process that has imported `preloaded_imports.py`; started once."""
    context, before = multiprocessing.get_context("forkserver"), os.environ.copy()
    context.set_forkserver_preload(["helpers.preloaded_imports"])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent / "internvl_chat"), str(TESTS)])
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def _run(command: list[str], env: dict[str, str], said: list[Path]) -> None:
    assert "helpers.preloaded_imports" in sys.modules, "not forked from the process that has imported everything"
    os.environ.clear()
    os.environ.update(env)
    for number, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    multiprocessing.set_start_method(None, force=True)  # the program's own processes start as they always do
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
