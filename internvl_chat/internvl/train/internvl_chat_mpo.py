"""Optimize an InternVL chat model on preferences (DPO, MPO).

    torchrun --nproc_per_node=8 internvl/train/internvl_chat_mpo.py --loss_type sigmoid,bco_pair --rpo_alpha 1 ...

It is the same program as `internvl_chat_finetune.py`, for pairs of answers.
"""

if __name__ == "__main__":  # before the imports below, which take seconds: a signal may come at any time
    from internvl.runtime.process import prepare_rank

    prepare_rank()

import logging
from pathlib import Path

from internvl.arguments.model import ModelArguments
from internvl.arguments.preference import PREFERENCE_ARGUMENTS, DPOConfig, PreferenceDataArguments
from internvl.arguments.preference import PreferenceDataArguments as DataTrainingArguments  # noqa: F401
from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_preference_arguments
from internvl.checkpoint.resume import choose_resume_checkpoint, is_finished_without_checkpoints
from internvl.checkpoint.resume_rules import RunRecord
from internvl.constants import IGNORE_INDEX  # noqa: F401
from internvl.data.preference_dataset import PreferenceDataset, collate_pairs
from internvl.data.preference_dataset import PreferenceDataset as LazySupervisedDataset  # noqa: F401
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.lora import LORA_RANK_FIELDS
from internvl.runtime.output_dir import claim_output_dir
from internvl.runtime.shutdown import abort_all_ranks_on_error, exit_process_group, join_process_group
from internvl.train.build_data import build_data
from internvl.train.build_model import build_model, build_tokenizer, load_model
from internvl.train.build_trainer import build_trainer
from internvl.train.preference_loss import PreferenceLoss, PreferenceModel
from internvl.train.run_evaluation import build_run_evaluation, check_evaluation_flags
from internvl.train.run_training import set_up_logging, train_and_save
from internvl.train.trainable_parameters import get_untrained_tokens
from internvl.train.trainer_dpo import MultimodalDPOTrainer

logger = logging.getLogger(__name__)


def main() -> None:
    """Train, save and exit, as `internvl_chat_finetune.py` does."""
    exit_process_group(train())


def train() -> int:
    """Run the program and return its exit status."""
    with abort_all_ranks_on_error():
        join_process_group()
        model_args, data_args, training_args = parse_args(classes=PREFERENCE_ARGUMENTS)
        set_up_logging(training_args)
        validate_preference_arguments(model_args, data_args, training_args)
        loss = PreferenceLoss(data_args, training_args)
        check_evaluation_flags(data_args, training_args, ("loss", *loss.metric_names))
        claim_output_dir(model_args, data_args, training_args)
        run_record = RunRecord(model_args, data_args, training_args)
        if is_finished_without_checkpoints(training_args, run_record):
            return 0
        checkpoint = choose_resume_checkpoint(training_args)
        if checkpoint:
            run_record.resume_from(Path(checkpoint))
        tokenizer = build_tokenizer(model_args, data_args)
        model = build_model(model_args, data_args, training_args, tokenizer, PreferenceModel)
        assert isinstance(model, PreferenceModel)
        reference = build_reference(model, model_args, data_args, training_args)
        untrained_tokens = get_untrained_tokens(model, tokenizer)
        data = build_data(
            data_args, training_args, tokenizer, model.num_image_token, PreferenceDataset, untrained_tokens
        )
        evaluation = build_run_evaluation(
            *(data, data_args, training_args, tokenizer, model, PreferenceDataset, untrained_tokens)
        )
        trainer = build_trainer(
            *(model, tokenizer, data, data_args, training_args, run_record, MultimodalDPOTrainer, collate_pairs),
            evaluation=evaluation,
            loss=loss,
            reference=reference,
        )
        return train_and_save(trainer, data, checkpoint)


def build_reference(
    model: PreferenceModel, model_args: ModelArguments, data_args: PreferenceDataArguments, args: DPOConfig
) -> PreferenceModel | None:
    """Load a frozen copy of the model as it is before training.

    Returns:
        None if no copy is needed, because the reference is `model` with its adapters disabled.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # PiSSA subtracts its initial adapters from the base weights, which alone are not the reference then.
    has_pissa = any(settings["variant"] == "pissa" for settings in (model.config.lora_settings or {}).values())
    trains_adapters_only = all("lora_" in name for name in trainable) and not has_pissa
    if args.reference_free or (trains_adapters_only and not starts_from_adapters(model_args)):
        return None
    logger.info("Reference model: loading a second copy of the model")
    # It is loaded by the same steps, with another copy of the tokenizer, and so gets the same new tokens and tile size.
    tokenizer = build_tokenizer(model_args, data_args)
    reference = load_model(model_args, data_args, args, tokenizer, PreferenceModel)
    assert isinstance(reference, PreferenceModel)
    return reference.requires_grad_(False).eval()


def starts_from_adapters(model_args: ModelArguments) -> bool:
    """Check whether the run starts from adapters; they belong to the reference."""
    if not model_args.model_name_or_path:
        return False
    config = InternVLChatConfig.from_pretrained(model_args.model_name_or_path)
    return any(getattr(config, rank) for rank in LORA_RANK_FIELDS.values())


if __name__ == "__main__":
    main()
