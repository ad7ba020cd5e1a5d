"""Preference optimisation of an InternVL chat model (DPO, MPO, ...): the entry point that every rank starts.

    torchrun --nproc_per_node=8 internvl/train/internvl_chat_mpo.py --loss_type sigmoid,bco_pair --rpo_alpha 1 ...

The program of `internvl_chat_finetune.py` on pairs of answers.
"""

import logging
import shutil
from pathlib import Path

from internvl.arguments.preference import DPOConfig, PreferenceDataArguments
from internvl.arguments.training import ModelArguments
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.lora import LORA_RANK_FIELDS
from internvl.train.build_model import build_tokenizer, load_model
from internvl.train.preference_loss import InternVLChatModel

if __name__ == "__main__":  # before the imports below, which take seconds: a signal may come at any time
    from internvl.runtime.signals import preemption

    preemption.listen()

from internvl.arguments.preference import PREFERENCE_ARGUMENTS  # noqa: F401
from internvl.arguments.preference import PreferenceDataArguments as DataTrainingArguments  # noqa: F401
from internvl.arguments.training import parse_args  # noqa: F401
from internvl.arguments.validate import validate_preference_arguments
from internvl.checkpoint.resume import choose_resume_checkpoint
from internvl.data.preference_dataset import PreferenceDataset, pair_collator
from internvl.data.preference_dataset import PreferenceDataset as LazySupervisedDataset  # noqa: F401
from internvl.runtime.shutdown import abort_all_ranks_on_error, join_process_group
from internvl.train.build_data import build_data
from internvl.train.build_model import build_model
from internvl.train.build_trainer import build_trainer
from internvl.train.preference_loss import PreferenceLoss
from internvl.train.run_training import exit_process_group, set_up_logging, train_and_save
from internvl.train.trainer_dpo import MultimodalDPOTrainer

logger = logging.getLogger(__name__)

# The Python files that upstream's published checkpoints carry.
CODE = ["conversation.py"]
CODE += [f"{kind}_{part}.py" for kind in ("configuration", "modeling") for part in ("intern_vit", "internlm2")]
CODE += ["configuration_internvl_chat.py", "modeling_internvl_chat.py"]


def main() -> None:
    """Set up, train, save, leave. What the user or the data did wrong ends it with one sentence and status 1, a signal
    with a checkpoint and status 85."""
    exit_process_group(train())


def train() -> int:
    with abort_all_ranks_on_error():
        join_process_group()
        model_args, data_args, training_args = parse_args(classes=PREFERENCE_ARGUMENTS)
        set_up_logging(training_args)
        validate_preference_arguments(model_args, data_args, training_args)
        checkpoint = choose_resume_checkpoint(training_args)
        tokenizer = build_tokenizer(model_args, data_args)
        model = build_model(model_args, data_args, training_args, tokenizer, InternVLChatModel)
        reference = build_reference(model, model_args, data_args, training_args)
        data = build_data(data_args, training_args, tokenizer, model.num_image_token, PreferenceDataset)
        loss = PreferenceLoss(data_args, training_args)
        trainer = build_trainer(
            *(model, tokenizer, data, data_args, training_args, MultimodalDPOTrainer, pair_collator),
            loss=loss,
            reference=reference,
        )
        status = train_and_save(trainer, data, checkpoint)
        if not status:
            copy_code(model_args, training_args)
    return status


def copy_code(model_args: ModelArguments, training_args: DPOConfig) -> None:
    """Hand a checkpoint's own Python files on, for readers that run remote code; here nothing runs them."""
    source, target = Path(model_args.model_name_or_path or ""), Path(training_args.output_dir)
    if training_args.should_save and training_args.do_train:
        for name in CODE:
            if (source / name).is_file():
                shutil.copy(source / name, target / name)


if __name__ == "__main__":
    main()


def build_reference(
    model: InternVLChatModel, model_args: ModelArguments, data_args: PreferenceDataArguments, args: DPOConfig
) -> InternVLChatModel | None:
    """The model as training finds it, frozen; None if it needs no copy: it is `model` with its adapters switched off.

    The copy is loaded by the same steps, with a tokenizer of its own, so that it gets the same new tokens and tiles.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    pissa = any(settings["variant"] == "pissa" for settings in (model.config.lora_settings or {}).values())
    apart = all("lora_" in name for name in trained) and not pissa  # PiSSA takes its beginning out of the weights
    if args.reference_free or (apart and not had_adapters(model_args)):
        return None
    logger.info("loading a second copy of the model: the reference")
    tokenizer = build_tokenizer(model_args, data_args)
    return load_model(model_args, data_args, args, tokenizer, InternVLChatModel).requires_grad_(False).eval()


def had_adapters(model_args: ModelArguments) -> bool:
    """Whether the run starts from a checkpoint that holds adapters already: then these belong to the reference."""
    if not model_args.model_name_or_path:
        return False
    config = InternVLChatConfig.from_pretrained(model_args.model_name_or_path)
    return any(getattr(config, rank) for rank in LORA_RANK_FIELDS.values())
