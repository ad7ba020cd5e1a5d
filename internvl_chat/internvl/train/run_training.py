"""Logging, training and saving of every training program."""

import logging
import platform
import sys
import warnings
from pathlib import Path

import transformers

from internvl.arguments.training import TrainingArguments
from internvl.checkpoint.manager import one_line_io_errors
from internvl.checkpoint.resume_rules import describe_environment
from internvl.checkpoint.trainer_state import TRAINER_STATE_FILE, read_global_step
from internvl.dist_utils import run_on_rank_0
from internvl.model.internvl_chat.adapter_checkpoint import list_weight_files
from internvl.runtime.signals import PREEMPTED_EXIT_STATUS
from internvl.train.build_data import TrainingData
from internvl.train.run_evaluation import prepare_model
from internvl.train.run_reports import find_evaluation
from internvl.train.run_summary import write_run_file, write_run_summary
from internvl.train.trainer import InternVLTrainer
from internvl.versions import warn_about_untested_versions

logger = logging.getLogger(__name__)


def train_and_save(trainer: InternVLTrainer, data: TrainingData, checkpoint: str | None) -> int:
    """Train to the end; save model, trainer state and metrics.

    Args:
        checkpoint: to resume from, if any.

    Returns:
        The exit status: 0, or 85 if a signal has stopped the run. Then no model is saved: the run is to be resumed.
    """
    if not trainer.args.do_train:
        if trainer.args.do_eval:
            prepare_model(trainer)
            trainer.save_metrics("eval", trainer.evaluate())
            return 0
        logger.info("--do_train False: everything is set up, exiting without training")
        return 0
    if checkpoint and has_finished(trainer, Path(checkpoint)):
        return 0
    write_run_summary(trainer, data, is_resumed=checkpoint is not None)
    write_run_file(trainer, sys.argv[1:])
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.graceful_stop.has_stopped:
        return PREEMPTED_EXIT_STATUS
    output_dir, metrics = trainer.checkpoints.output_dir, result.metrics
    with one_line_io_errors(f"the model cannot be written to {output_dir}"):
        if trainer.args.should_save:  # it marks a complete model, see `has_finished`
            (output_dir / TRAINER_STATE_FILE).unlink(missing_ok=True)
        trainer.save_model()
    step = trainer.loaded_best_step or trainer.state.global_step
    if trainer.args.load_best_model_at_end and not trainer.loaded_best_step:
        logger.warning("Best checkpoint: none; the model is that of the last step")
    logger.info("Saved the model of step %d to %s", step, output_dir)
    if evaluated := find_evaluation(trainer.state, step):
        trainer.save_metrics("eval", {name: value for name, value in evaluated.items() if name != "step"})
    if trainer.num_trained_steps:
        logger.info(
            "Training finished: %d steps, mean loss %.4f, %.1f s",
            *(trainer.state.global_step, metrics["train_loss"], metrics["train_runtime"]),
        )
        trainer.save_metrics("train", {**metrics, "train_samples": int(data.is_usable.sum())})
    trainer.save_state()
    return 0


def has_finished(trainer: InternVLTrainer, checkpoint: Path) -> bool:
    """Check whether the steps of a run are trained and its model is saved. A collective."""
    trainer.resume_position(checkpoint)
    step, last_step = trainer.state.global_step, trainer.count_steps()
    if step < last_step:
        return False
    logger.info("Training has finished: %s is at step %d, the run ends at step %d", checkpoint, step, last_step)
    is_saved = run_on_rank_0(lambda: find_saved_step(trainer.checkpoints.output_dir, checkpoint) in (step, last_step))
    if is_saved:
        logger.info("Nothing to do: the model is in %s", trainer.args.output_dir)
    return is_saved


def find_saved_step(output_dir: Path, checkpoint: Path) -> int | None:
    """Find the step of the model in the output folder; None if it is incomplete or another run's."""
    names = [file.relative_to(checkpoint) for file in list_weight_files(checkpoint)]
    if checkpoint.resolve().parent != output_dir.resolve() or not all((output_dir / n).is_file() for n in names):
        return None
    try:
        return read_global_step(output_dir)
    except (OSError, ValueError):  # it is written after the model
        return None


def set_up_logging(args: TrainingArguments) -> None:
    """Log this package at info level on rank 0, otherwise only errors."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=logging.ERROR,
        stream=sys.stdout,
    )
    logging.getLogger("internvl").setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)
    if args.process_index != 0 or not sys.stderr.isatty():  # in a file, each refresh of a bar would add a line
        transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about one another
    versions = {"python": platform.python_version(), **describe_environment()["versions"]}
    logger.info("Versions: %s", ", ".join(f"{name} {version}" for name, version in versions.items()))
    warn_about_untested_versions()
