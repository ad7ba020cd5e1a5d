"""Watch training runs from outside: output, steps, a stalled file."""

import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from helpers.training_runs import write_meta_file

HANG_SECONDS = 120  # a process that still runs after this many seconds hangs
STALLED_IMAGE = "im0.png"  # an image of the recorded data set
LOGGED_STEP = re.compile(r"'grad_norm'|grad norm ")  # once in the log line of each step


def count_logged_steps(output: str) -> int:
    """Count the optimizer steps that a run has logged."""
    return len(LOGGED_STEP.findall(output))


def wait_until(
    condition_fn: Callable[[], object],
    describe_fn: Callable[[], str],
    seconds: float = HANG_SECONDS,
    processes: Iterable = (),
) -> None:
    """Wait for a condition.

    Args:
        describe_fn: makes the message of the failure.
        processes: must not exit before (objects with `poll`).
    """
    deadline = time.monotonic() + seconds
    while not condition_fn():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline, describe_fn()
        time.sleep(0.02)


def link_dataset(tiny_inputs: Path, goldens: Path, folder: Path) -> tuple[Path, Path]:
    """Make a data set whose images can be replaced.

    Returns:
        A folder to start runs with, in place of `tiny`, and the folder of the images.
    """
    data, images = folder / "tiny", folder / "images"
    data.mkdir()
    images.mkdir()
    for file in (goldens / "dataset/images").iterdir():
        os.link(file, images / file.name)
    for name in ("model", "train.jsonl"):
        (data / name).symlink_to(tiny_inputs / name)
    write_meta_file(data, images)
    return data, images


def stall_image(images: Path) -> bytes:
    """Replace an image by a pipe without a writer; return the image.

    Opening the pipe blocks, like a file on a file system that does not respond.
    """
    content = (images / STALLED_IMAGE).read_bytes()
    os.mkfifo(images / "pipe")
    os.replace(images / "pipe", images / STALLED_IMAGE)
    return content


def resume_image(images: Path, content: bytes) -> None:
    """Restore the image and unblock the process that reads the pipe."""
    restored = images / "restored"
    restored.write_bytes(content)
    with open(images / STALLED_IMAGE, "wb") as pipe:  # blocks until the reader has opened it
        os.replace(restored, images / STALLED_IMAGE)
        pipe.write(content)
