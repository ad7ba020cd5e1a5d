"""What every training program does around its objects: tell what happens, train to the end. See also `ending.py`."""

import gc
import logging
import sys
import warnings

import torch.distributed as dist
import transformers

from internvl.train.arguments import TrainingArguments
from internvl.train.build_data import Data
from internvl.train.ending import say_goodbye
from internvl.train.trainer import InternVLTrainer


def train_and_save(trainer: InternVLTrainer, data: Data, checkpoint: str | None) -> None:
    """Train from the checkpoint, if any, to the end; leave model, state and metrics in the output folder."""
    if not trainer.args.do_train:
        logging.getLogger("internvl").info("--do_train False: everything is set up, nothing is trained")
        return
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", {**result.metrics, "train_samples": int(data.usable.sum())})
    trainer.save_state()


def leave() -> None:
    """End the process group when nothing holds it any more: an exit with its threads alive is aborted now and then."""
    say_goodbye()
    gc.collect()
    dist.destroy_process_group()


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
