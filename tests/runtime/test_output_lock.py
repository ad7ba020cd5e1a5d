"""The lock of an output folder names its holder; locks without a holder are replaced."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers.live_runs import wait_until
from helpers.paths import PACKAGE_DIR

from internvl.runtime import output_lock
from internvl.runtime.output_lock import (
    LOCK_FILE,
    STALE_SECONDS,
    OutputInUseError,
    OutputLock,
    describe_this_process,
    find_running_holder,
    is_lock_held,
)

HOLD = """
import sys, time
from pathlib import Path
from internvl.runtime.output_lock import hold_output_lock
hold_output_lock(Path(sys.argv[1]), "other", print)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def start_holder(folder: Path, seconds: float = 1000, *wrapper: str) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(PACKAGE_DIR)}
    command = [*wrapper, sys.executable, "-c", HOLD, str(folder), str(seconds)]
    holder = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


@pytest.mark.multiprocess
def test_a_second_run_is_refused_until_the_first_has_exited(tmp_path):
    folder = tmp_path / "out"
    with start_holder(folder) as holder:
        try:
            with pytest.raises(
                OutputInUseError, match=f"is in use by another run: process {holder.pid} on .*kill {holder.pid}"
            ):
                OutputLock(folder, "new")
            assert str(holder.pid) in find_running_holder(folder)
        finally:
            holder.send_signal(signal.SIGKILL)
    assert (folder / LOCK_FILE).exists() and not find_running_holder(folder), "killed: it could not release the lock"
    lock = OutputLock(folder, "new")
    assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert list(folder.iterdir()) == []


@pytest.mark.multiprocess
def test_a_lock_is_released_on_exit(tmp_path):
    with start_holder(tmp_path, 0) as holder:
        assert holder.wait(20) == 0
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_one_run_share_the_lock(tmp_path):
    first, second = OutputLock(tmp_path, "run"), OutputLock(tmp_path, "run")
    second.release()
    assert (tmp_path / LOCK_FILE).exists(), "only its owner removes it"
    first.release()
    assert not (tmp_path / LOCK_FILE).exists()


def write_lock(folder: Path, age: float = 0.0, **changes) -> None:
    """Write the lock of another machine's process."""
    holder = replace(describe_this_process("other"), machine="another", host="host7", **changes)
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    os.utime(folder / LOCK_FILE, (time.time() - age,) * 2)


STALE_LOCKS = {
    "no sign of life for long": {"age": STALE_SECONDS + 1},
    "an earlier start of this job": {"job": "12", "job_start": "0"},
}


@pytest.mark.parametrize("lock", STALE_LOCKS.values(), ids=STALE_LOCKS)
def test_stale_locks_of_other_machines_are_replaced(tmp_path, monkeypatch, lock):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write_lock(tmp_path, **lock)
    start = time.monotonic()
    OutputLock(tmp_path, "new").release()
    assert time.monotonic() - start < 2


def test_lock_is_held_by_a_living_process_or_recent_heartbeat(tmp_path):
    file, holder = tmp_path / LOCK_FILE, describe_this_process("run")
    assert not is_lock_held(tmp_path)
    for lock, is_held in {
        holder: True,
        replace(holder, process_start="1"): False,  # another process had this number
        replace(holder, machine="other"): True,
    }.items():
        file.write_text(json.dumps(asdict(lock)))
        assert is_lock_held(tmp_path) == is_held
    os.utime(file, (0, 0))
    assert not is_lock_held(tmp_path), "no heartbeat for a long time"


def test_a_process_number_that_is_used_again_is_another_process(tmp_path):
    holder = replace(describe_this_process("other"), process_start="1")
    (tmp_path / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    OutputLock(tmp_path, "new").release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": 1}'])
def test_an_incomplete_lock_is_replaced_once_it_is_old(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    os.utime(tmp_path / LOCK_FILE, (1e9, 1e9))
    OutputLock(tmp_path, "new").release()


@pytest.mark.multiprocess
def test_another_pid_namespace_is_another_machine(tmp_path, monkeypatch):
    """As containers of one host: whether the holder lives is known by its heartbeat."""
    wrapper = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("requires namespaces")
    monkeypatch.setattr(output_lock, "STALE_SECONDS", 20.0)
    with start_holder(tmp_path, 1000, *wrapper) as holder:
        start = time.monotonic()
        with pytest.raises(OutputInUseError, match="in use by another run"):
            OutputLock(tmp_path, "new")
        assert time.monotonic() - start < 18, "its heartbeat is seen"
        holder.kill()
    os.utime(tmp_path / LOCK_FILE, (time.time() - 19,) * 2)
    OutputLock(tmp_path, "new").release()


def test_a_holder_notices_that_its_lock_was_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(output_lock, "HEARTBEAT_SECONDS", 0.05)
    messages: list[str] = []
    lock = OutputLock(tmp_path, "run", messages.append)
    write_lock(tmp_path)
    wait_until(lambda: messages, lambda: "no message", 5)
    assert "was replaced by another run, process" in messages[0] and "host7" in messages[0]
    lock.release()
    assert (tmp_path / LOCK_FILE).exists(), "the other run's lock stays"


def test_a_removed_lock_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(output_lock, "HEARTBEAT_SECONDS", 0.05)
    lock = OutputLock(tmp_path, "run")
    (tmp_path / LOCK_FILE).unlink()
    wait_until((tmp_path / LOCK_FILE).exists, lambda: "no lock", 5)
    lock.release()
