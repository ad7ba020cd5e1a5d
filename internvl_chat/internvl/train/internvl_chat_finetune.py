"""Fine-tune an InternVL chat model: the entry point that torchrun or srun starts on every rank.

    torchrun --nproc_per_node=8 internvl/train/internvl_chat_finetune.py --model_name_or_path ... --meta_path ...

`shell/` holds recipes that do this; reads from top to bottom, every line has a home elsewhere.
"""

import logging
import os
import sys
import time
import warnings

import torch.distributed as dist
import transformers

from internvl.dist_utils import init_dist, rank
from internvl.train.arguments import DataTrainingArguments, ModelArguments, TrainingArguments, parse_args  # noqa: F401
from internvl.train.build import Data, build_data, build_model, build_tokenizer, build_trainer
from internvl.train.check import check, resume_point
from internvl.train.constants import IGNORE_INDEX, BadSample  # noqa: F401
from internvl.train.dataset import LazySupervisedDataset  # noqa: F401
from internvl.train.trainer import InternVLTrainer


def main() -> None:
    """Set up, train, save. What the user or the data did wrong ends it with one sentence and status 1."""
    try:
        init_dist(os.environ.get("LAUNCHER"))
        model_args, data_args, training_args = parse_args()
        set_up_logging(training_args)
        check(model_args, data_args)
        checkpoint = resume_point(training_args)
        tokenizer = build_tokenizer(model_args, data_args)
        model = build_model(model_args, data_args, training_args, tokenizer)
        data = build_data(data_args, training_args, tokenizer, model.num_image_token)
        trainer = build_trainer(model, tokenizer, data, data_args, training_args)
    except (ValueError, OSError) as error:
        give_up(error)

    train_and_save(trainer, data, checkpoint)
    dist.destroy_process_group()  # without it an exit is aborted now and then


def train_and_save(trainer: InternVLTrainer, data: Data, checkpoint: str | None) -> None:
    """Train from the checkpoint, if any, to the end; leave model, state and metrics in the output folder."""
    if not trainer.args.do_train:
        logging.getLogger("internvl").info("--do_train False: everything is set up, nothing is trained")
        return
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except BadSample as error:
        give_up(error)

    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", {**result.metrics, "train_samples": int(data.usable.sum())})
    trainer.save_state()


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


def give_up(error: Exception) -> None:
    """End this rank with status 1 and one sentence; INTERNVL_TRACEBACK=1 shows where it came from."""
    if os.environ.get("INTERNVL_TRACEBACK") == "1":
        raise error
    if rank() != 0:
        time.sleep(5)  # most errors meet every rank: rank 0 tells, and the launcher ends the others meanwhile
    sys.exit(f"error: {error}" if rank() == 0 else f"error on rank {rank()}: {error}")


if __name__ == "__main__":
    main()
