"""The checkpoint manager alone: atomic writes, rotation, errors of the disk."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import PACKAGE_DIR, REPO_ROOT

from internvl.checkpoint.manager import UNFINISHED_DIR, CheckpointManager, one_line_io_errors
from internvl.checkpoint.manifest import find_checkpoint_errors, fsync_paths


def write(manager: CheckpointManager, step: int) -> None:
    """Write a checkpoint of a few files."""
    with manager.writing(step):
        folder = manager.unfinished_dir / f"checkpoint-{step}"
        (folder / "vision_model").mkdir(parents=True)
        (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
        (folder / "vision_model/adapter_model.safetensors").write_bytes(b"weights")


def list_names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_checkpoint_is_published_with_its_manifest(tmp_path, caplog):
    caplog.set_level("INFO", "internvl")
    manager = CheckpointManager(tmp_path, is_writer=True)
    assert manager.resume_hint == "the same command starts from the beginning"
    write(manager, 3)
    assert list_names(tmp_path) == {"checkpoint-3"}
    assert find_checkpoint_errors(tmp_path / "checkpoint-3") == []
    assert manager.last_saved_step == 3 and manager.save_seconds > 0
    assert manager.resume_hint == "the same command resumes from checkpoint-3"
    assert re.fullmatch(r"Saved checkpoint-3 \([0-9.]+ s\)", caplog.messages[-1])


def test_interrupted_write_leaves_the_previous_checkpoint(tmp_path):
    manager = CheckpointManager(tmp_path, is_writer=True)
    write(manager, 3)
    message = "checkpoint-6 cannot be written: disk failure; .* bytes are free there; the same command resumes from "
    message += "checkpoint-3 once this is fixed"
    with pytest.raises(OSError, match=message), manager.writing(6):
        (manager.unfinished_dir / "checkpoint-6").mkdir(parents=True)
        raise RuntimeError("disk failure\nand a page of details")
    assert list_names(tmp_path) == {"checkpoint-3", UNFINISHED_DIR}, "an incomplete checkpoint has no checkpoint's name"
    write(manager, 6)
    assert list_names(tmp_path) == {"checkpoint-3", "checkpoint-6"}


def test_checkpoint_of_the_same_step_is_replaced(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/damaged").touch()
    write(CheckpointManager(tmp_path, is_writer=True), 3)
    assert list_names(tmp_path / "checkpoint-3") == {"manifest.json", "trainer_state.json", "vision_model"}


@pytest.mark.parametrize(("limit", "remaining"), [(None, {2, 4, 9, 6}), (0, {2, 4, 9, 6}), (2, {4, 6}), (1, {6})])
def test_rotation_removes_later_steps_first_and_then_the_oldest(tmp_path, limit, remaining):
    for step in (2, 4, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    write(CheckpointManager(tmp_path, is_writer=True, save_total_limit=limit), 6)
    assert list_names(tmp_path) == {f"checkpoint-{step}" for step in remaining} | {"checkpoint-best"}


def test_trial_checkpoint_is_written_read_and_removed(tmp_path):
    manager, verified = CheckpointManager(tmp_path, is_writer=True), []

    def write_trial(folder):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"0" * 1000)

    manager.write_trial_checkpoint(write_trial, lambda folder: verified.append(list_names(folder)), num_trainable=10)
    assert verified == [{"file", "manifest.json"}] and not list_names(tmp_path) and manager.save_seconds > 0
    with pytest.raises(OSError, match="bytes free, a checkpoint requires 12,000,000,000,000,001,1"):
        manager.write_trial_checkpoint(write_trial, lambda folder: None, num_trainable=10**18)


# A library for LD_PRELOAD: a file system on which fsync of a folder fails, as on CIFS, 9p and some of FUSE.
FSYNC_WITHOUT_FOLDERS = """
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
int fsync(int fd) {
    struct stat status;
    if (!fstat(fd, &status) && S_ISDIR(status.st_mode)) { errno = ERROR; return -1; }
    return syscall(SYS_fsync, fd);
}
"""
WRITE_CHECKPOINTS = """
import sys
from pathlib import Path
from checkpoint.test_manager import list_names, write
from internvl.checkpoint.manager import CheckpointManager
manager = CheckpointManager(sys.argv[1], is_writer=True)
manager.write_trial_checkpoint(lambda folder: folder.mkdir(parents=True), list_names, num_trainable=1)
write(manager, 3)
"""


@pytest.mark.multiprocess
@pytest.mark.compile
@pytest.mark.parametrize(("error", "status"), [("EINVAL", 0), ("EOPNOTSUPP", 0), ("EBADF", 0), ("EIO", 1)])
def test_file_system_that_cannot_flush_folders(tmp_path, error, status):
    """It is known before the first step, if it cannot be tolerated."""
    (tmp_path / "fsync.c").write_text(FSYNC_WITHOUT_FOLDERS)
    compiler = ["cc", "-shared", "-fPIC", f"-DERROR={error}", "-o", tmp_path / "fsync.so", tmp_path / "fsync.c"]
    subprocess.run(compiler, check=True)
    env = os.environ | {"LD_PRELOAD": str(tmp_path / "fsync.so"), "PYTHONPATH": f"{PACKAGE_DIR}:{REPO_ROOT / 'tests'}"}
    command = [sys.executable, "-c", WRITE_CHECKPOINTS, str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    if status:
        assert f"OSError: no checkpoint can be written to {tmp_path}/out: [Errno 5]" in done.stderr
    else:
        assert find_checkpoint_errors(tmp_path / "out/checkpoint-3") == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="requires Linux")
def test_folders_of_a_real_file_system_without_fsync_are_tolerated():
    with pytest.raises(OSError, match="Invalid argument"):
        fsync_paths(Path("/proc/self/status"))
    fsync_paths(Path("/proc/self"))


def test_removed_output_dir_is_created_again(tmp_path):
    manager = CheckpointManager(tmp_path / "out", is_writer=True)
    write(manager, 3)
    (tmp_path / "out").rename(tmp_path / "moved")
    manager.recreate_output_dir()
    assert (tmp_path / "out").is_dir() and manager.last_saved_step == 0


def test_only_errors_of_the_disk_become_os_errors():
    with pytest.raises(ValueError, match="^one line$"), one_line_io_errors("saving"):
        raise ValueError("one line")
    with pytest.raises(RuntimeError, match="^gloo: connection closed"), one_line_io_errors("saving"):
        raise RuntimeError("gloo: connection closed by peer")
    with pytest.raises(OSError, match="^saving: KeyError$"), one_line_io_errors("saving"):
        raise KeyError


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(1, 2, {2, 5}), (1, 5, {5}), (2, 2, {2, 5}), (3, 2, {2, 4, 5}), (1, None, {5}), (None, 2, {1, 2, 3, 4, 5})],
)
def test_best_checkpoint_is_not_rotated_away(tmp_path, limit, best, kept):
    manager = CheckpointManager(tmp_path, is_writer=True, save_total_limit=limit)
    for step in range(1, 6):
        if step == best:
            manager.best = tmp_path / f"checkpoint-{step}"
        write(manager, step)
    assert list_names(tmp_path) == {f"checkpoint-{step}" for step in kept}
