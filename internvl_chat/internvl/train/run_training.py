"""What every training program does around its objects: tell what happens, train to the end. See also `ending.py`."""

import gc
import logging
import sys
import warnings

import torch.distributed as dist
import transformers

from internvl.arguments.training import TrainingArguments
from internvl.runtime.shutdown import leave_rank_monitor
from internvl.runtime.signals import PREEMPTED_EXIT_STATUS, ignore_signals
from internvl.train.build_data import TrainingData
from internvl.train.trainer import InternVLTrainer
from internvl.train.trainer_checkpoint import one_line_io_errors


def train_and_save(trainer: InternVLTrainer, data: TrainingData, checkpoint: str | None) -> int:
    """Train from the checkpoint, if any, to the end; leave model, state and metrics in the output folder.

    Returns:
        The exit status: 0, or 85 for a run that a signal stopped, which leaves what it was started to make to the next.
    """
    if not trainer.args.do_train:
        logging.getLogger("internvl").info("--do_train False: everything is set up, nothing is trained")
        return 0
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped:
        return PREEMPTED_EXIT_STATUS
    with one_line_io_errors(f"the model cannot be written to {trainer.args.output_dir}"):
        trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", {**result.metrics, "train_samples": int(data.usable.sum())})
    trainer.save_state()
    return 0


def exit_process_group(status: int) -> None:
    """End the process group when nothing holds it any more: an exit with its threads alive is aborted now and then."""
    leave_rank_monitor()
    gc.collect()
    dist.destroy_process_group()
    if status:
        ignore_signals()
        sys.exit(status)


def set_up_logging(args: TrainingArguments) -> None:
    """Rank 0 tells what happens; the other ranks, and libraries, only what is wrong."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.ERROR, stream=sys.stdout
    )
    logging.getLogger("internvl").setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)
    if args.process_index != 0:
        transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # libraries about one another
