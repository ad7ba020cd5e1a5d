"""Choose the checkpoint that a run resumes from."""

import logging
from pathlib import Path

from internvl.arguments.training import TrainingArguments
from internvl.checkpoint.manifest import STATE, faults, found_first, newest_whole
from internvl.dist_utils import from_first_rank

logger = logging.getLogger(__name__)


AUTO = "auto"  # --resume_from_checkpoint: what happens without the flag


def resume_point(training_args: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one asked for, else the newest whole one in the output folder; a collective.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged; no checkpoint in the output folder is whole; or the
            folder holds a finished model and may not be overwritten.
    """
    if (asked := training_args.resume_from_checkpoint) not in (None, AUTO):
        if not from_first_rank((Path(asked) / STATE).is_file):
            raise ValueError(f"--resume_from_checkpoint {asked}: no checkpoint (no {STATE}) there.")
        if found := faults(Path(asked)):
            raise ValueError(f"--resume_from_checkpoint {asked} is damaged: {found_first(found)}.")
        return asked
    folder = Path(training_args.output_dir)
    if training_args.overwrite_output_dir or not training_args.do_train:
        return None
    last = newest_whole(folder, _pass_over)
    if last:
        logger.info("resuming from %s; --overwrite_output_dir starts afresh", last)
    elif (folder / "config.json").exists():
        raise ValueError(
            f"--output_dir {folder} holds a finished model and no checkpoint to resume from: choose another folder, "
            "or say --overwrite_output_dir True."
        )
    return str(last) if last else None


def _pass_over(checkpoint: Path, found: list[str]) -> None:
    logger.warning("%s is passed over: %s", checkpoint, found_first(found))
