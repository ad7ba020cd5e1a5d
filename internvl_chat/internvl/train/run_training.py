"""Logging, training, saving and exit of every training program."""

import gc
import logging
import sys
import warnings

import torch.distributed as dist
import transformers

from internvl.arguments.training import TrainingArguments
from internvl.checkpoint.manager import one_line_io_errors
from internvl.runtime.shutdown import leave_rank_monitor
from internvl.runtime.signals import PREEMPTED_EXIT_STATUS, ignore_signals
from internvl.train.build_data import TrainingData
from internvl.train.trainer import InternVLTrainer

logger = logging.getLogger(__name__)


def train_and_save(trainer: InternVLTrainer, data: TrainingData, checkpoint: str | None) -> int:
    """Train to the end; save model, trainer state and metrics.

    Args:
        checkpoint: to resume from, if any.

    Returns:
        The exit status: 0, or 85 if a signal has stopped the run. Then no model is saved: the run is to be resumed.
    """
    if not trainer.args.do_train:
        logger.info("--do_train False: everything is set up, exiting without training")
        return 0
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.graceful_stop.has_stopped:
        return PREEMPTED_EXIT_STATUS
    with one_line_io_errors(f"the model cannot be written to {trainer.args.output_dir}"):
        trainer.save_model()
    logger.info("Saved the model to %s", trainer.args.output_dir)
    metrics = result.metrics
    logger.info(
        "Training finished: %d steps, mean loss %.4f, %.1f s",
        *(trainer.state.global_step, metrics["train_loss"], metrics["train_runtime"]),
    )
    trainer.save_metrics("train", {**metrics, "train_samples": int(data.is_usable.sum())})
    trainer.save_state()
    return 0


def exit_process_group(status: int) -> None:
    """Destroy the process group and exit.

    While threads of the group are alive, the exit of Python occasionally aborts.
    """
    leave_rank_monitor()
    gc.collect()  # no object may refer to the group any more
    dist.destroy_process_group()
    if status:
        ignore_signals()
        sys.exit(status)


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
