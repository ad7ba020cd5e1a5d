"""Preference optimisation of an InternVL chat model (DPO, MPO, ...): the entry point that every rank starts.

    torchrun --nproc_per_node=8 internvl/train/internvl_chat_mpo.py --loss_type sigmoid,bco_pair --rpo_alpha 1 ...

The program of `internvl_chat_finetune.py` on pairs of answers.
"""

import os
import shutil
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which take seconds: a signal may come at any time
    from internvl.train.preemption import preemption

    preemption.listen()

from internvl.dist_utils import init_dist
from internvl.train.arguments import MPO, DPOConfig, ModelArguments, parse_args  # noqa: F401
from internvl.train.arguments import PreferenceDataArguments as DataTrainingArguments  # noqa: F401
from internvl.train.build import build_model, build_tokenizer, build_trainer
from internvl.train.build_data import build_data
from internvl.train.build_mpo import build_reference, check_preference
from internvl.train.check import resume_point
from internvl.train.preference import PreferenceDataset, pair_collator
from internvl.train.preference import PreferenceDataset as LazySupervisedDataset  # noqa: F401
from internvl.train.preference_loss import InternVLChatModel, PreferenceLoss
from internvl.train.run import give_up, leave, set_up_logging, train_and_save
from internvl.train.trainer_dpo import MultimodalDPOTrainer

# The Python files that upstream's published checkpoints carry.
CODE = ["conversation.py"]
CODE += [f"{kind}_{part}.py" for kind in ("configuration", "modeling") for part in ("intern_vit", "internlm2")]
CODE += ["configuration_internvl_chat.py", "modeling_internvl_chat.py"]


def main() -> None:
    """Set up, train, save, leave. What the user or the data did wrong ends it with one sentence and status 1, a signal
    with a checkpoint and status 85."""
    leave(train())


def train() -> int:
    try:
        init_dist(os.environ.get("LAUNCHER"))
        model_args, data_args, training_args = parse_args(classes=MPO)
        set_up_logging(training_args)
        check_preference(model_args, data_args, training_args)
        checkpoint = resume_point(training_args)
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
    except (ValueError, OSError) as error:
        give_up(error)

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
