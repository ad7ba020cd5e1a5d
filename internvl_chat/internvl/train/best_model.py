"""The best checkpoint and early stopping of a run that resumes.

transformers keeps the best metric in the state of the trainer, and the evaluations without an improvement in
`EarlyStoppingCallback`. Both are in `trainer_state.json` of each checkpoint. The path of the best checkpoint in there
is not used, because the folder may have moved: the best checkpoint is beside the one that the run resumes from.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from transformers import EarlyStoppingCallback

from internvl.arguments.training import TrainingArguments
from internvl.checkpoint.resume_rules import read_flags_file
from internvl.checkpoint.trainer_state import TRAINER_STATE_FILE, read_trainer_state

if TYPE_CHECKING:
    from internvl.train.trainer import InternVLTrainer

logger = logging.getLogger(__name__)
# Flags without which the values of two evaluations cannot be compared.
COMPARED_FLAGS = (
    *("metric_for_best_model", "greater_is_better", "eval_meta_path", "eval_share", "eval_base_answers"),
    *("eval_num_samples", "eval_max_new_tokens"),
)


class BestModelRecord(NamedTuple):
    """What a checkpoint knows about the best model.

    Attributes:
        path: of the best checkpoint; None if there is none.
        num_without_improvement: evaluations since the best one, for early stopping.
        is_comparable: whether the best metric was measured on the evaluation sets of this run's flags.
    """

    path: Path | None = None
    num_without_improvement: int = 0
    is_comparable: bool = True


def read_best_model(checkpoint: Path, args: TrainingArguments) -> BestModelRecord:
    """Read what a checkpoint, which is untrusted, knows about the best model."""
    state, flags = read_trainer_state(checkpoint), (read_flags_file(checkpoint) or {}).get("flags", {})
    if any(flags.get(name) != getattr(args, name) for name in COMPARED_FLAGS):
        return BestModelRecord(is_comparable=False)
    best, output_dir = state.get("best_model_checkpoint"), Path(str(args.output_dir))
    # Paths are compared with those of the output folder, which may be relative.
    folder = output_dir if checkpoint.parent.resolve() == output_dir.resolve() else checkpoint.parent
    path = folder / Path(best).name if best else None
    if path is not None and not path.is_dir():
        logger.warning("Best checkpoint: %s of step %s does not exist any more", path, state.get("best_global_step"))
        path = None
    return BestModelRecord(path, read_patience_counter(checkpoint, state))


def read_patience_counter(checkpoint: Path, state: dict) -> int:
    """Return the evaluations without an improvement; 0 if the run did not count them."""
    saved = state.get("stateful_callbacks", {}).get(EarlyStoppingCallback.__name__)
    if saved is None:
        return 0
    attributes = saved.get("attributes") if isinstance(saved, dict) else None
    counter = attributes.get("early_stopping_patience_counter") if isinstance(attributes, dict) else None
    if type(counter) is not int or not 0 <= counter <= state["global_step"]:
        raise ValueError(
            f"{checkpoint / TRAINER_STATE_FILE} is invalid: {EarlyStoppingCallback.__name__} is {saved!r:.80}, "
            "expected an early_stopping_patience_counter."
        )
    return counter


def restore_best_model(trainer: "InternVLTrainer") -> None:
    """Set the best checkpoint and the counter of early stopping after resuming."""
    record, state = trainer.best_model, trainer.state
    if not record.is_comparable:
        if state.best_metric is not None:
            logger.info("Best checkpoint: chosen anew, because its metric or the flags of the evaluation sets differ")
        state.best_metric = state.best_global_step = None
    trainer.checkpoints.best = record.path
    state.best_model_checkpoint = None if record.path is None else str(record.path)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            callback.early_stopping_patience_counter = record.num_without_improvement


def update_best_checkpoint(trainer: "InternVLTrainer") -> None:
    """Set the path of the best checkpoint, if it is that of the current step."""
    state, checkpoints = trainer.state, trainer.checkpoints
    if state.best_global_step == state.global_step:
        checkpoints.best = checkpoints.output_dir / f"checkpoint-{state.global_step}"
    state.best_model_checkpoint = None if checkpoints.best is None else str(checkpoints.best)


def publish_best_checkpoint(trainer: "InternVLTrainer") -> None:
    """Write the final path of the best checkpoint to a checkpoint that is being written.

    transformers (5.24) writes the path in `unfinished/`.
    """
    update_best_checkpoint(trainer)
    if trainer.args.should_save:
        folder = trainer.checkpoints.unfinished_dir / f"checkpoint-{trainer.state.global_step}"
        trainer.state.save_to_json(str(folder / TRAINER_STATE_FILE))
