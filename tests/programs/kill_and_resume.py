"""Runs of two ranks that are killed again and again.

`python kill_and_resume.py KILLS SEED FOLDER [flags of a training]`

What a training imports is imported once and then forked, so that a life takes seconds. This process is the launcher:
when a rank dies, the other is told to end, as torchrun tells it, and has to within 20 seconds. Moments (from before the
ranks have met to well into the training) and victims (one rank or both) are drawn from SEED. A run that reaches its end
is followed by one in a new folder, until there were as many kills; the last run is left to end.
Prints a line for every life; the finished runs are FOLDER/1, FOLDER/2, ...
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

from internvl.dist_utils import free_port
from internvl.runtime.signals import preemption
from internvl.train.internvl_chat_finetune import main

LONGEST = 5.0  # seconds until a kill


def life(rank: int, port: str, output: Path, flags: list[str]) -> None:
    """What a launcher and an entry point do."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    with open(output.with_suffix(".log"), "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    preemption.listen()
    sys.argv = ["train", *flags, "--output_dir", str(output)]
    main()


def live(output: Path, flags: list[str], moment: float | None, victims: list[int]) -> list[int | None]:
    """Start both ranks, kill the victims at a moment, or let them end; how they ended."""
    port = free_port()
    ranks = [multiprocessing.Process(target=life, args=(rank, port, output, flags)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + (120 if moment is None else moment)
    while time.monotonic() < end and any(rank.is_alive() for rank in ranks):
        time.sleep(0.005)
    for victim in victims if moment else ():
        ranks[victim].kill()
    for rank in ranks:
        if rank.is_alive() and len(victims) == 1 and rank is not ranks[victims[0]]:
            rank.terminate()
        rank.join(20)
        assert not rank.is_alive(), f"a rank hangs: {ranks}"
    return [rank.exitcode for rank in ranks]


def lives(kills: int, seed: int, folder: Path, flags: list[str]) -> None:
    draw, killed, finished = random.Random(seed), 0, 0
    while killed < kills or not finished or (folder / f"{finished + 1}").exists():
        moment = draw.uniform(0.05, LONGEST) if killed < kills else None
        victims = draw.choice([[0], [1], [0, 1]])
        codes = live(folder / f"{finished + 1}", flags, moment, victims)
        killed += -signal.SIGKILL in codes
        print(f"{killed} kills, run {finished + 1}, {moment} s, {victims}: {codes}", flush=True)
        if codes == [0, 0]:
            finished += 1
        assert moment or codes == [0, 0], codes


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    lives(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
