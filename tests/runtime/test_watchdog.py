"""A stalled step prints the stacks of every rank."""

import re
import threading
import time

import psutil
import pytest
from helpers.live_runs import HANG_SECONDS, count_logged_steps, find_workers, wait_until
from helpers.training_runs import TRAIN_ADAPTERS, build_launch_command, read_step_logs

from internvl.runtime.watchdog import Watchdog


@pytest.fixture
def watchdog():
    """Make a watchdog after steps of 0.05 s: 0.5 s is a stall."""
    watchdog = Watchdog(factor=10, min_stall_seconds=0.3, rank=3)
    watchdog.start(1)
    for _ in range(5):
        time.sleep(0.05)
        watchdog.begin_next_step()
    yield watchdog
    watchdog.stop()


def test_a_stalled_step_is_reported_once_and_so_is_its_end(watchdog, capfd):
    time.sleep(0.3)
    assert not capfd.readouterr().err
    time.sleep(1.5)
    watchdog.begin_next_step()
    time.sleep(0.4)
    watchdog.begin_next_step()
    lines = [line for line in capfd.readouterr().err.split("\n") if line]
    assert all(line.startswith("[rank 3] ") for line in lines)
    assert re.fullmatch(r"\[rank 3\] step 6 is slow: \d\.\d s so far, median 0\.\d s\. Stacks, .*:", lines[0])
    assert re.search(r"test_watchdog\.py:\d+ test_a_stalled_step_is_reported_once", lines[2])
    assert re.fullmatch(r"\[rank 3\] step 6 finished after \d\.\d s", lines[-1])
    assert len([line for line in lines if "is slow" in line]) == 1


def test_saving_is_compared_with_saving(watchdog, capfd):
    """A slow save is no stall of a step.

    The first save may take `factor` times the minimum.
    """
    with watchdog.during("saving"):
        time.sleep(0.7)
    with watchdog.during("saving"):
        time.sleep(1.5)
    watchdog.begin_next_step()
    assert not capfd.readouterr().err
    watchdog.durations["saving"].extend([0.01] * 5)
    with watchdog.during("saving"):
        time.sleep(0.6)
    assert re.search(r"\[rank 3\] saving after step 6 is slow: 0\.\d s", capfd.readouterr().err)


def test_a_step_costs_less_than_20_microseconds(watchdog):
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(1000):
            watchdog.begin_next_step()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02


def test_factor_0_starts_no_thread():
    before, watchdog = set(threading.enumerate()), Watchdog(factor=0, min_stall_seconds=0.1, rank=0)
    watchdog.start(1)
    assert not set(threading.enumerate()) - before
    watchdog.begin_next_step()
    watchdog.stop()


@pytest.mark.multiprocess
def test_the_stacks_show_which_rank_waits_for_a_stalled_worker(tiny_inputs, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    flags = [*TRAIN_ADAPTERS, *"--max_steps 40 --save_strategy no --watchdog_factor 3 --watchdog_seconds 2".split()]
    command, env = build_launch_command(tiny_inputs, output, *flags, "--dataloader_num_workers", "1", ranks=2)

    def printed() -> str:
        return log.read_text(errors="replace")

    with log.open("wb") as file, psutil.Popen(command, env=env, stderr=file, stdout=file) as process:

        def wait_for(text: str) -> None:
            wait_until(lambda: text in printed(), lambda: printed()[-3000:], processes=[process])

        try:
            wait_until(lambda: count_logged_steps(printed()), lambda: printed()[-3000:], processes=[process])
            assert "is slow" not in printed()
            _, worker = find_workers(process)[1]
            worker.suspend()
            for rank in (0, 1):
                wait_for(f"[rank {rank}] step")
            time.sleep(1.5)  # a second report of the same stall would come by now
            worker.resume()
            assert process.wait(HANG_SECONDS) == 0
        finally:
            if process.is_running():
                process.kill()
    lines = [line for line in printed().splitlines() if line.startswith("[rank ")]
    for rank in "01":
        lines_of_rank = [line for line in lines if line.startswith(f"[rank {rank}]")]
        assert len([line for line in lines_of_rank if "is slow" in line]) == 1
        assert re.fullmatch(rf"\[rank {rank}\] step \d+ finished after \d+\.\d s", lines_of_rank[-1])
    worker_stacks = [re.search(r"rank (\d)\]   worker process \d+ ", line) for line in lines]
    assert {match[1] for match in worker_stacks if match} == {"0", "1"}
    assert [line[6] for line in lines if "no response" in line] == ["1"]
    assert {line[6] for line in lines if "_try_get_data" in line} == {"1"}, "rank 1 waits for its worker"
    assert "0" in {line[6] for line in lines if "distributed" in line}, "rank 0 waits for rank 1"
    assert len(read_step_logs(output)) == 40
