"""Kill a run of two ranks again and again, and resume it.

    python kill_and_resume.py KILLS SEED FOLDER [training flags]

This process is the launcher. Ranks are forked from it, so an attempt takes seconds. When one rank is killed, the other
gets SIGTERM, as from torchrun, and must exit within 20 seconds. The time of a kill (from before the ranks have
connected to well into the training) and its victims (one rank or both) are drawn from SEED. After a run has finished,
the next one starts in a new folder, until KILLS kills have happened; then the last run is left to finish.
Prints a line per attempt. The finished runs are FOLDER/1, FOLDER/2, ...
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

from internvl.launchers import find_free_port
from internvl.runtime.signals import preemption
from internvl.train.internvl_chat_finetune import main

MAX_SECONDS_TO_KILL = 5.0


def run_rank(rank: int, port: str, output: Path, flags: list[str]) -> None:
    """Train in a forked process, with the environment that a launcher sets."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    with open(output.with_suffix(".log"), "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    preemption.listen()
    sys.argv = ["train", *flags, "--output_dir", str(output)]
    main()


def run_attempt(output: Path, flags: list[str], kill_after: float | None, victims: list[int]) -> list[int | None]:
    """Start both ranks and kill the victims after some seconds, if any.

    Returns the exit codes of both.
    """
    port = find_free_port()
    ranks = [multiprocessing.Process(target=run_rank, args=(rank, port, output, flags)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + (120 if kill_after is None else kill_after)
    while time.monotonic() < deadline and any(rank.is_alive() for rank in ranks):
        time.sleep(0.005)
    for victim in victims if kill_after else ():
        ranks[victim].kill()
    for rank in ranks:
        if rank.is_alive() and len(victims) == 1 and rank is not ranks[victims[0]]:
            rank.terminate()
        rank.join(20)
        assert not rank.is_alive(), f"a rank hangs: {ranks}"
    return [rank.exitcode for rank in ranks]


def kill_repeatedly(kills: int, seed: int, folder: Path, flags: list[str]) -> None:
    """Run attempts until KILLS kills have happened and a run has finished."""
    generator, num_killed, num_finished = random.Random(seed), 0, 0
    while num_killed < kills or not num_finished or (folder / f"{num_finished + 1}").exists():
        kill_after = generator.uniform(0.05, MAX_SECONDS_TO_KILL) if num_killed < kills else None
        victims = generator.choice([[0], [1], [0, 1]])
        exit_codes = run_attempt(folder / f"{num_finished + 1}", flags, kill_after, victims)
        num_killed += -signal.SIGKILL in exit_codes
        print(f"{num_killed} kills, run {num_finished + 1}, {kill_after} s, {victims}: {exit_codes}", flush=True)
        if exit_codes == [0, 0]:
            num_finished += 1
        assert kill_after or exit_codes == [0, 0], exit_codes


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    kill_repeatedly(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
