"""Choose the checkpoint that a run resumes from."""

import logging
from pathlib import Path

from internvl.arguments.training import TrainingArguments
from internvl.checkpoint.manifest import (
    TRAINER_STATE_FILE,
    find_checkpoint_errors,
    find_latest_valid_checkpoint,
    summarize_errors,
)
from internvl.dist_utils import run_on_rank_0

logger = logging.getLogger(__name__)


RESUME_AUTO = "auto"  # --resume_from_checkpoint: what happens without the flag


def choose_resume_checkpoint(training_args: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one asked for, else the newest whole one in the output folder; a collective.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged; no checkpoint in the output folder is whole; or the
            folder holds a finished model and may not be overwritten.
    """
    if (asked := training_args.resume_from_checkpoint) not in (None, RESUME_AUTO):
        if not run_on_rank_0((Path(asked) / TRAINER_STATE_FILE).is_file):
            raise ValueError(f"--resume_from_checkpoint {asked}: no checkpoint (no {TRAINER_STATE_FILE}) there.")
        if found := find_checkpoint_errors(Path(asked)):
            raise ValueError(f"--resume_from_checkpoint {asked} is damaged: {summarize_errors(found)}.")
        return asked
    folder = Path(training_args.output_dir)
    if training_args.overwrite_output_dir or not training_args.do_train:
        return None
    last = find_latest_valid_checkpoint(folder, _log_invalid_checkpoint)
    if last:
        logger.info("resuming from %s; --overwrite_output_dir starts afresh", last)
    elif (folder / "config.json").exists():
        raise ValueError(
            f"--output_dir {folder} holds a finished model and no checkpoint to resume from: choose another folder, "
            "or say --overwrite_output_dir True."
        )
    return str(last) if last else None


def _log_invalid_checkpoint(checkpoint: Path, found: list[str]) -> None:
    logger.warning("%s is passed over: %s", checkpoint, summarize_errors(found))
