"""Build the trainer of a run from model, data and flags."""

import logging
from collections.abc import Callable
from functools import partial

from transformers import PreTrainedTokenizerBase

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.training import TrainingArguments
from internvl.data.collators import collate_rows
from internvl.data.images import NORMALIZATION_STATS
from internvl.model.internvl_chat import InternVLChatModel
from internvl.planning.data_schedule import DataSchedule
from internvl.planning.plan_report import format_epoch_plan
from internvl.planning.sample_cost import compute_sample_cost
from internvl.train.build_data import TrainingData, build_plan_layout, count_max_skipped_samples
from internvl.train.skipped_samples import SkippedSampleReport
from internvl.train.trainer import InternVLTrainer

logger = logging.getLogger(__name__)


def build_preprocessor_config(data_args: DataTrainingArguments) -> dict:
    """Build the content of `preprocessor_config.json`, as in published checkpoints."""
    mean, std = NORMALIZATION_STATS[data_args.normalize_type]
    return {
        "crop_size": data_args.force_image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": 3,
        "size": data_args.force_image_size,
    }


def build_trainer(
    model: InternVLChatModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    trainer_class: type[InternVLTrainer] = InternVLTrainer,
    collator: Callable = collate_rows,
    **kwargs,
) -> InternVLTrainer:
    """Plan the first epoch, log the plan and create the trainer.

    Args:
        kwargs: passed on to `trainer_class`.
    """
    layout = build_plan_layout(data_args, training_args, training_args.world_size, compute_sample_cost(model))
    schedule = DataSchedule(data.lengths, data.digests, layout, data.weights)
    logger.info(
        "Epoch plan:\n%s",
        format_epoch_plan(
            data.lengths, schedule.plan(0), schedule.layout, len(data.skipped_samples), data.lost_loss_tokens
        ),
    )
    model.loss_reduction = data_args.loss_reduction
    collator = partial(collator, pad_id=tokenizer.pad_token_id)
    if data_args.use_packed_ds and data_args.strict_mode:
        collator = partial(collator, max_item_length=data_args.max_packed_tokens)
    max_skipped = count_max_skipped_samples(data_args, len(data.lengths))
    return trainer_class(
        model=model,
        args=training_args,
        train_dataset=data.dataset,
        data_collator=collator,
        processing_class=tokenizer,
        schedule=schedule,
        skipped_samples=SkippedSampleReport(map(str, data.skipped_samples), max_skipped),
        preprocessor=build_preprocessor_config(data_args),
        accept_changed_data=data_args.accept_changed_data,
        all_gather_loss=data_args.loss_reduction_all_gather,
        **kwargs,
    )
