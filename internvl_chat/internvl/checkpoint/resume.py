"""Choose the checkpoint that a run resumes from."""

import logging
from pathlib import Path

from internvl.arguments.training import TrainingArguments
from internvl.checkpoint.manifest import (
    TRAINER_STATE_FILE,
    find_checkpoint_errors,
    find_latest_valid_checkpoint,
    list_checkpoints,
    summarize_errors,
)
from internvl.checkpoint.resume_rules import RunRecord
from internvl.dist_utils import run_on_rank_0
from internvl.model.internvl_chat.adapter_checkpoint import list_weight_files

logger = logging.getLogger(__name__)
RESUME_AUTO = "auto"  # --resume_from_checkpoint auto is the same as its default


def choose_resume_checkpoint(training_args: TrainingArguments) -> str | None:
    """Choose the requested checkpoint, else the latest valid one. A collective.

    Returns:
        None if the run starts from the beginning.

    Raises:
        ValueError: the requested checkpoint does not exist or is damaged; no checkpoint in the output folder is valid;
            or the folder holds a finished model, which is not overwritten.
    """
    requested = training_args.resume_from_checkpoint
    if requested not in (None, RESUME_AUTO):
        if not run_on_rank_0((Path(requested) / TRAINER_STATE_FILE).is_file):
            raise ValueError(
                f"--resume_from_checkpoint {requested or repr(requested)}: no checkpoint there (no "
                f"{TRAINER_STATE_FILE}). {RESUME_AUTO}, the default, takes the latest valid one in --output_dir."
            )
        if errors := find_checkpoint_errors(Path(requested)):
            raise ValueError(f"--resume_from_checkpoint {requested} is damaged: {summarize_errors(errors)}.")
        return requested
    folder = Path(str(training_args.output_dir))
    if training_args.overwrite_output_dir or not training_args.do_train:
        return None
    latest = find_latest_valid_checkpoint(folder, _log_invalid_checkpoint)
    if latest:
        logger.info("Latest valid checkpoint: %s (--overwrite_output_dir True starts from the beginning)", latest)
        return str(latest)
    if (folder / "config.json").exists():
        raise ValueError(
            f"--output_dir {folder} holds a finished model and no checkpoint to resume from: choose another folder, "
            "or overwrite it with --overwrite_output_dir True."
        )
    return None


def is_finished_without_checkpoints(training_args: TrainingArguments, run_record: RunRecord) -> bool:
    """Check whether this very run has finished, without saving checkpoints.

    A collective.
    """
    folder = Path(str(training_args.output_dir))
    is_new_run = training_args.overwrite_output_dir or not training_args.do_train
    if is_new_run or training_args.resume_from_checkpoint not in (None, RESUME_AUTO):
        return False
    is_finished = run_on_rank_0(
        lambda: (
            not list_checkpoints(folder)
            and bool(list_weight_files(folder))
            and (folder / TRAINER_STATE_FILE).is_file()  # it is written after the model
            and run_record.equals(folder)
        )
    )
    if is_finished:
        logger.info("Training has finished: nothing to do, the model is in %s", folder)
    return is_finished


def _log_invalid_checkpoint(checkpoint: Path, errors: list[str]) -> None:
    logger.warning("Skipped invalid checkpoint %s: %s", checkpoint, summarize_errors(errors))
