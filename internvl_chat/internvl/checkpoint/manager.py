"""Write, test and rotate the checkpoints of a run."""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from internvl.checkpoint.manifest import fsync_paths, list_checkpoints, write_manifest
from internvl.checkpoint.trainer_state import parse_checkpoint_step
from internvl.dist_utils import is_collective_error

logger = logging.getLogger(__name__)
UNFINISHED_DIR = "unfinished"  # a checkpoint is written in here before it gets its name
# A master weight and two moments of AdamW in fp32, for each trainable parameter. They do not exist before the first
# step, so a trial checkpoint does not contain them.
OPTIMIZER_BYTES_PER_PARAMETER = 12


class CheckpointManager:
    """Checkpoints in the output folder of a run, each complete or absent.

    Files are written to `unfinished/`, flushed to the disk and then renamed: if the run is killed at any moment, the
    previous checkpoint is still valid. Methods that write are collectives.

    Args:
        is_writer: whether this rank renames and removes folders.
        save_total_limit: checkpoints to keep; None or 0 for all.
        one_dir_per_node: each node has a separate output folder (`--save_on_each_node`).

    Attributes:
        best: the best checkpoint, which is not rotated away; None without one.
        last_saved_step: step of this run's newest checkpoint; 0 before the first one.
        save_seconds: duration of the last save; 0.0 before the first one.
    """

    def __init__(
        self,
        output_dir: str | Path,
        is_writer: bool,
        save_total_limit: int | None = None,
        one_dir_per_node: bool = False,
    ):
        self.output_dir = Path(output_dir)
        self.is_writer, self.save_total_limit, self.one_dir_per_node = is_writer, save_total_limit, one_dir_per_node
        self.best: Path | None = None
        self.last_saved_step = 0
        self.save_seconds = 0.0

    @property
    def unfinished_dir(self) -> Path:
        """Parent of the checkpoint that is being written."""
        return self.output_dir / UNFINISHED_DIR

    @property
    def resume_hint(self) -> str:
        """Clause for messages: from where the same command continues the run."""
        if self.last_saved_step:
            return f"the same command resumes from checkpoint-{self.last_saved_step}"
        return "the same command starts from the beginning"

    # -- writing -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Publish what the block writes to `unfinished_dir / checkpoint-STEP`.

        Raises:
            OSError: writing failed; the message has the free space and where the run resumes.
        """
        start, name = time.monotonic(), f"checkpoint-{step}"
        try:
            with one_line_io_errors(f"{name} cannot be written"):
                self._remove_unfinished()
                yield
                barrier()
                write_manifest(self.unfinished_dir / name, self.is_writer, self.one_dir_per_node)
                if self.is_writer:
                    self._publish(name)
                barrier()
        except OSError as error:
            raise OSError(f"{error}; {self._free_space()}; {self.resume_hint} once this is fixed") from error
        self.last_saved_step, self.save_seconds = step, time.monotonic() - start
        logger.info("Saved %s (%.1f s)", name, self.save_seconds)

    def _publish(self, name: str) -> None:
        unfinished, final = self.unfinished_dir, self.output_dir / name
        if final.exists():  # it is damaged, or belongs to a run that this one overwrites
            os.replace(final, unfinished / "replaced")
        os.replace(unfinished / name, final)
        fsync_paths(self.output_dir)
        shutil.rmtree(unfinished)
        self.rotate(final)

    def rotate(self, newest: Path) -> None:
        """Remove checkpoints beyond `save_total_limit`, but neither `newest` nor the best one.

        With a limit of 1, two remain if the best one is not the newest. Checkpoints of later steps, which belong to an
        abandoned run, are removed first, then the oldest ones.
        """
        if not self.save_total_limit or self.save_total_limit < 0:
            return
        checkpoints = list_checkpoints(newest.parent)
        steps = {path: parse_checkpoint_step(path) or 0 for path in [*checkpoints, newest]}
        others = [path for path in checkpoints if path not in (newest, self.best)]
        others.sort(key=lambda path: (steps[path] < steps[newest], steps[path]))
        for path in others[: max(0, len(checkpoints) - self.save_total_limit)]:
            shutil.rmtree(path, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        if self.is_writer:
            shutil.rmtree(self.unfinished_dir, ignore_errors=True)
        barrier()

    def recreate_output_dir(self) -> None:
        """Create the output folder after somebody removed it, with all checkpoints."""
        if self.is_writer:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self.last_saved_step = 0

    # -- before the first step -----------------------------------------------------------------------------------------

    def write_trial_checkpoint(
        self, write_fn: Callable[[Path], None], verify_fn: Callable[[Path], object], num_trainable: int
    ) -> None:
        """Write, read and remove a checkpoint before the first step.

        Otherwise a full disk or a missing permission would be noticed only hours later.

        Args:
            write_fn: writes the checkpoint into a folder; a collective.
            verify_fn: reads it; called on the writing rank only, because other nodes may have other disks.
            num_trainable: number of trainable parameters, for the size of the optimizer states.

        Raises:
            OSError: writing failed, or there is no space for the optimizer states.
            ValueError: reading failed.
        """
        start, folder = time.monotonic(), self.unfinished_dir
        with one_line_io_errors(f"no checkpoint can be written to {self.output_dir}"):
            self._remove_unfinished()
            write_fn(folder / "trial")
            barrier()
            write_manifest(folder / "trial", self.is_writer, self.one_dir_per_node)
            if self.is_writer:  # as `_publish` does; some object stores that are mounted cannot rename a folder
                os.replace(folder / "trial", folder / "renamed")
                fsync_paths(folder)
        if self.is_writer:
            verify_fn(folder / "renamed")
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            free, required = shutil.disk_usage(folder).free, size + OPTIMIZER_BYTES_PER_PARAMETER * num_trainable
            if free < required:
                raise OSError(f"{self.output_dir} has {free:,} bytes free, a checkpoint requires {required:,}")
            logger.info("Trial checkpoint: %.1f MB written and read in %.1f s", size / 1e6, time.monotonic() - start)
        self._remove_unfinished()
        self.save_seconds = time.monotonic() - start

    def _free_space(self) -> str:
        try:
            return f"{shutil.disk_usage(self.output_dir).free:,} bytes are free there"
        except OSError:
            return f"{self.output_dir} does not exist"


@contextlib.contextmanager
def one_line_io_errors(what_failed: str) -> Iterator[None]:
    """Raise an OSError of one line for any error of a write.

    Every library has different errors for a full or broken disk, some with pages of text.
    """
    try:
        yield
    except ValueError:  # one of ours, in one line
        raise
    except Exception as error:
        if is_collective_error(error):  # another rank failed, not the disk
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(f"{what_failed}: {lines[0]}") from error


def barrier() -> None:
    """Wait for all ranks, if there are several."""
    if dist.is_initialized():
        dist.barrier()
