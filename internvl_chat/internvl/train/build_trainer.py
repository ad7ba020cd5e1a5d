"""Build the trainer of a run: epoch plan, collator, checkpoint metadata."""

import logging
from collections.abc import Callable
from functools import partial

from torch import nn
from transformers import PreTrainedTokenizerBase

from internvl.arguments.training import DataTrainingArguments, TrainingArguments
from internvl.data.collators import row_collator
from internvl.data.images import NORMALIZATION
from internvl.model.activation_checkpointing import recomputed_layer_share
from internvl.model.internvl_chat import InternVLChatModel
from internvl.planning.data_schedule import DataSchedule
from internvl.planning.epoch_plan import PlanLayout
from internvl.planning.plan_report import format_plan
from internvl.planning.sample_cost import Passes, step_cost
from internvl.train.build_data import TrainingData, count_allowed_bad_samples
from internvl.train.trainer import InternVLTrainer

logger = logging.getLogger(__name__)


def preprocessor_config(data_args: DataTrainingArguments) -> dict:
    """`preprocessor_config.json` as published checkpoints have it: size, mean and deviation of a tile."""
    mean, std = NORMALIZATION[data_args.normalize_type]
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
    collator: Callable = row_collator,
    **kwargs,
) -> InternVLTrainer:
    """Plan the epochs and put everything into a trainer; `kwargs` go to it, too."""
    schedule = DataSchedule(
        data.lengths, data.digests, build_plan_layout(model, data_args, training_args), data.weights
    )
    logger.info("the data:\n%s", format_plan(data.lengths, schedule.plan(0), schedule.layout, len(data.bad_samples)))
    model.loss_reduction = data_args.loss_reduction
    collator = partial(collator, pad_id=tokenizer.pad_token_id)
    if data_args.use_packed_ds and data_args.strict_mode:
        collator = partial(collator, max_item_length=data_args.max_packed_tokens)
    return trainer_class(
        model=model,
        args=training_args,
        train_dataset=data.rows,
        data_collator=collator,
        processing_class=tokenizer,
        schedule=schedule,
        bad_samples=list(map(str, data.bad_samples)),
        max_bad_samples=count_allowed_bad_samples(data_args, len(data.lengths.tokens)),
        preprocessor=preprocessor_config(data_args),
        accept_changed_data=data_args.accept_changed_data,
        all_gather=data_args.loss_reduction_all_gather,
        **kwargs,
    )


def build_plan_layout(
    model: InternVLChatModel, data_args: DataTrainingArguments, training_args: TrainingArguments
) -> PlanLayout:
    """What the flags say about rows and steps; cost is that of this model, of which these parts train."""

    def passes(part: nn.Module) -> int:
        trained = [name for name, parameter in part.named_parameters() if parameter.requires_grad]
        whole = any("lora_" not in name for name in trained)
        return 1 + recomputed_layer_share(part) + 1 + whole if trained else 1

    llm = max(passes(model.language_model), passes(model.vision_model), 2)  # gradients go through it in any case
    return PlanLayout(
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        world_size=training_args.world_size,
        micro_batch=training_args.per_device_train_batch_size,
        accumulation=training_args.gradient_accumulation_steps,
        group_by_length=training_args.group_by_length and not data_args.use_packed_ds,
        packed=data_args.use_packed_ds,
        max_tokens=data_args.max_packed_tokens,
        max_tiles=data_args.num_images_expected,
        cost=step_cost(model.config, Passes(vision=passes(model.vision_model), llm=llm)),
    )
