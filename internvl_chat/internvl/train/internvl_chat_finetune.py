"""Fine-tune an InternVL chat model: the entry point that torchrun or srun starts on every rank.

    torchrun --nproc_per_node=8 internvl/train/internvl_chat_finetune.py --model_name_or_path ... --meta_path ...

`shell/` holds recipes that do this; reads from top to bottom, every line has a home elsewhere.
"""

if __name__ == "__main__":  # before the imports below, which take seconds: a signal may come at any time
    from internvl.train.preemption import preemption

    preemption.listen()

from internvl.train.arguments import DataTrainingArguments, ModelArguments, TrainingArguments, parse_args  # noqa: F401
from internvl.train.build import build_model, build_tokenizer, build_trainer
from internvl.train.build_data import build_data
from internvl.train.check import check, resume_point
from internvl.train.constants import IGNORE_INDEX  # noqa: F401
from internvl.train.dataset import LazySupervisedDataset  # noqa: F401
from internvl.train.dataset_packed import len2weight  # noqa: F401
from internvl.train.ending import join_ranks, shared_end
from internvl.train.run import leave, set_up_logging, train_and_save


def main() -> None:
    """Set up, train, save, leave. What the user or the data did wrong ends it with one sentence and status 1, a signal
    with a checkpoint and status 85."""
    leave(train())


def train() -> int:
    with shared_end():
        join_ranks()
        model_args, data_args, training_args = parse_args()
        set_up_logging(training_args)
        check(model_args, data_args, training_args)
        checkpoint = resume_point(training_args)
        tokenizer = build_tokenizer(model_args, data_args)
        model = build_model(model_args, data_args, training_args, tokenizer)
        data = build_data(data_args, training_args, tokenizer, model.num_image_token)
        trainer = build_trainer(model, tokenizer, data, data_args, training_args)
        return train_and_save(trainer, data, checkpoint)


if __name__ == "__main__":
    main()
