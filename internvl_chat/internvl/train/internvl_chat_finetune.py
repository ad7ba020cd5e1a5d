"""Fine-tune an InternVL chat model.

    torchrun --nproc_per_node=8 internvl/train/internvl_chat_finetune.py --model_name_or_path ... --meta_path ...

torchrun or srun starts this program on every rank, as the recipes in `shell/` do.
"""

if __name__ == "__main__":  # before the imports below, which take seconds: a signal may come at any time
    from internvl.runtime.process import prepare_rank

    prepare_rank()

from pathlib import Path

from internvl.arguments.data import DataTrainingArguments  # noqa: F401
from internvl.arguments.model import ModelArguments  # noqa: F401
from internvl.arguments.training import TrainingArguments, parse_args  # noqa: F401
from internvl.arguments.validate import validate_arguments
from internvl.checkpoint.resume import choose_resume_checkpoint, is_finished_without_checkpoints
from internvl.checkpoint.resume_rules import RunRecord
from internvl.constants import IGNORE_INDEX  # noqa: F401
from internvl.data.collators import len2weight  # noqa: F401
from internvl.data.supervised_dataset import LazySupervisedDataset  # noqa: F401
from internvl.runtime.output_dir import claim_output_dir
from internvl.runtime.shutdown import abort_all_ranks_on_error, exit_process_group, join_process_group
from internvl.train.build_data import build_data
from internvl.train.build_model import build_model, build_tokenizer
from internvl.train.build_trainer import build_trainer
from internvl.train.run_evaluation import build_run_evaluation, check_evaluation_flags
from internvl.train.run_training import set_up_logging, train_and_save
from internvl.train.trainable_parameters import get_untrained_tokens


def main() -> None:
    """Train, save and exit.

    Exit status: 0; 1 after an error, reported in one line if the user or the data caused it; 85 after a preemption
    signal.
    """
    exit_process_group(train())


def train() -> int:
    """Run the program and return its exit status."""
    with abort_all_ranks_on_error():
        join_process_group()
        model_args, data_args, training_args = parse_args()
        set_up_logging(training_args)
        validate_arguments(model_args, data_args, training_args)
        check_evaluation_flags(data_args, training_args)
        claim_output_dir(model_args, data_args, training_args)
        run_record = RunRecord(model_args, data_args, training_args)
        if is_finished_without_checkpoints(training_args, run_record):
            return 0
        checkpoint = choose_resume_checkpoint(training_args)
        if checkpoint:
            run_record.resume_from(Path(checkpoint))
        tokenizer = build_tokenizer(model_args, data_args)
        model = build_model(model_args, data_args, training_args, tokenizer)
        untrained_tokens = get_untrained_tokens(model, tokenizer)
        data = build_data(data_args, training_args, tokenizer, model.num_image_token, untrained_tokens=untrained_tokens)
        evaluation = build_run_evaluation(
            *(data, data_args, training_args, tokenizer, model, LazySupervisedDataset, untrained_tokens)
        )
        trainer = build_trainer(*(model, tokenizer, data, data_args, training_args, run_record), evaluation=evaluation)
        return train_and_save(trainer, data, checkpoint)


if __name__ == "__main__":
    main()
