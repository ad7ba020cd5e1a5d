"""DataLoader workers: too little shared memory, killed workers, waits that never end."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers.live_runs import count_logged_steps, find_workers, wait_until
from helpers.paths import PACKAGE_DIR
from helpers.training_runs import TRAIN_ADAPTERS, build_launch_command

from internvl.checkpoint.manifest import find_latest_valid_checkpoint
from internvl.runtime import dataloader_workers
from internvl.runtime.dataloader_workers import choose_prefetch_factor, limit_num_workers
from internvl.runtime.signals import PREEMPTED_EXIT_STATUS

# Arguments: size of /dev/shm, then a command.
WITH_SMALL_SHM = 'mount -t tmpfs -o size="$1" tmpfs /dev/shm && shift && exec "$@"'
requires_mounts = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0, reason="requires mount namespaces"
)


def run_with_shm(size: str, command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    wrapper = ["unshare", "-m", "sh", "-c", WITH_SMALL_SHM, "sh", size]
    return subprocess.run([*wrapper, *command], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.multiprocess
@requires_mounts
@pytest.mark.parametrize(("size", "num_workers"), [("64k", 0), ("1250k", 1), ("64m", None)])
def test_workers_are_reduced_to_the_shared_memory(tiny_inputs, tmp_path, size, num_workers):
    flags = "--max_steps 3 --save_strategy no --no_smoke_save --dataloader_num_workers 2".split()
    command, env = build_launch_command(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, *flags, ranks=1)
    done = run_with_shm(size, command, env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert count_logged_steps(done.stdout + done.stderr) == 3
    warnings = re.findall(r"Dataloader workers per rank: (\d+) instead of 2\. /dev/shm has .* free", done.stdout)
    assert warnings == ([] if num_workers is None else [str(num_workers)])


def test_shared_memory_is_divided_among_the_ranks_of_a_machine(monkeypatch, caplog, tmp_path):
    free = 100e6
    monkeypatch.setattr(dataloader_workers.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    assert limit_num_workers(4, 2, 1, int(1e6), num_local_ranks=8) == 4 and not caplog.records
    assert limit_num_workers(4, 2, 0, int(2e6), num_local_ranks=8) == 2
    assert (
        "2 instead of 4. /dev/shm has 100 MB free; 8 batches of up to 2 MB on each of 8 ranks need 130 MB"
        in caplog.text
    )
    assert limit_num_workers(4, 2, 0, int(20e6), num_local_ranks=8) == 0
    assert limit_num_workers(0, 2, 0, int(20e6), num_local_ranks=8) == 0


def test_workers_prefetch_the_micro_batches_of_a_step(monkeypatch):
    monkeypatch.setattr(dataloader_workers.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100e6}))
    # (workers, micro-batches, used batches, bytes of a batch, ranks)
    assert choose_prefetch_factor(4, 16, 2, int(1e6), 1) == 4
    assert choose_prefetch_factor(4, 17, 2, int(1e6), 1) == 5
    assert choose_prefetch_factor(4, 1, 2, int(1e6), 1) == 2, "torch's default"
    assert choose_prefetch_factor(0, 16, 2, int(1e6), 1) == 16, "without workers it has no effect"
    assert choose_prefetch_factor(4, 16, 2, int(5e6), 1) == 3, "of the 15 batches that fit, 2 are in use"
    assert choose_prefetch_factor(4, 16, 2, int(5e6), 8) == 2, "then there are fewer workers"


FILL_SHARED_MEMORY = """
from functools import partial
import torch
from torch.utils.data import DataLoader
from internvl.runtime.dataloader_workers import collate_in_shared_memory, start_worker
from internvl.runtime.shutdown import abort_all_ranks_on_error
def collate(rows):
    return {"pixel_values": torch.zeros(1 << 22, dtype=torch.uint8)}
with abort_all_ranks_on_error():
    collate = partial(collate_in_shared_memory, collate)
    list(DataLoader([0] * 4, num_workers=1, collate_fn=collate, worker_init_fn=start_worker))
"""


@pytest.mark.multiprocess
@requires_mounts
def test_full_shared_memory_ends_the_run_with_one_sentence():
    """torch would print the error in the worker and wait forever."""
    done = run_with_shm("2m", [sys.executable, "-c", FILL_SHARED_MEMORY], os.environ | {"PYTHONPATH": str(PACKAGE_DIR)})
    assert done.returncode == 1
    assert re.fullmatch(r"\nerror: /dev/shm is full, .*--shm-size.*--dataloader_num_workers\.\n", done.stderr), (
        done.stderr
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize("first_step", [True, False])
def test_a_signal_ends_a_run_that_waits_for_data(tiny_inputs, tmp_path, first_step):
    """The worker is suspended, as by a file system that does not respond."""
    output, log = tmp_path / "out", tmp_path / "log"
    flags = "--max_steps 100000 --save_steps 2 --dataloader_num_workers 1 --watchdog_seconds 2".split()
    command, env = build_launch_command(tiny_inputs, output, *TRAIN_ADAPTERS, *flags, ranks=2)
    with log.open("wb") as file:
        run = psutil.Popen(command, env=env, stdout=file, stderr=file)
    read_log = log.read_text
    if not first_step:
        wait_until(lambda: count_logged_steps(read_log()) >= 3, read_log, processes=[run])
    else:
        wait_until(lambda: find_workers(run), read_log, processes=[run])
    _, worker = find_workers(run)[-1]
    worker.suspend()
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
    try:
        assert run.wait(30) == PREEMPTED_EXIT_STATUS, read_log()
    finally:
        worker.kill() if worker.is_running() else None
    newest = find_latest_valid_checkpoint(output, print)
    resumes = f"the same command resumes from {newest.name}" if newest else "the same command starts from the beginning"
    assert re.search(
        rf"rank \d: SIGTERM: no data for \d+ s, exiting without saving; {resumes} \(exit status 85\)", read_log()
    )


DIE_WHILE_IMPORTING = """
import os, sys
if __name__ == "__mp_main__":
    os._exit(3)
from torch.utils.data import DataLoader
from internvl.runtime.dataloader_workers import SpawnableDataset, start_worker
if __name__ == "__main__":
    dataset = SpawnableDataset(["x" * 300_000])
    list(DataLoader(dataset, num_workers=1, multiprocessing_context="spawn", worker_init_fn=start_worker))
"""


@pytest.mark.multiprocess
def test_a_worker_that_dies_while_importing_does_not_block_its_parent(tmp_path):
    (program := tmp_path / "program.py").write_text(DIE_WHILE_IMPORTING)
    done = subprocess.run(
        [sys.executable, program],
        env=os.environ | {"PYTHONPATH": str(PACKAGE_DIR)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "exited unexpectedly" in done.stderr
