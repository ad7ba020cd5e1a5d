"""Build the trainer of a run from model, data and flags."""

import logging
from collections.abc import Callable
from functools import partial

from transformers import PreTrainedTokenizerBase

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.deepspeed_config import limit_reduce_bucket
from internvl.arguments.training import TrainingArguments
from internvl.checkpoint.resume_rules import RunRecord
from internvl.constants import get_pad_id
from internvl.data.collators import collate_rows
from internvl.data.images import NORMALIZATION_STATS
from internvl.data.skipped_samples import SkippedSampleReport, count_max_skipped_samples
from internvl.evaluation.evaluation_cost import (
    count_evaluations,
    describe_model_cost,
    estimate_evaluation,
    estimate_step_seconds,
    format_evaluation_plan,
    measure_device_speed,
)
from internvl.evaluation.evaluation_data import EvaluationData
from internvl.evaluation.settings import EvaluationSettings
from internvl.model.auxiliary_files import (
    AuxiliaryFiles,
    build_preprocessor_config,
    compose_auxiliary_files,
    read_auxiliary_files,
    set_tile_size,
    update_preprocessor_config,
)
from internvl.model.internvl_chat import InternVLChatModel
from internvl.planning.batch_sampler import count_run_steps
from internvl.planning.data_schedule import DataSchedule
from internvl.planning.plan_report import format_epoch_plan
from internvl.planning.sample_cost import compute_forward_cost, compute_sample_cost
from internvl.train.build_data import TrainingData, build_plan_layout
from internvl.train.param_groups import count_elements
from internvl.train.run_evaluation import RunEvaluation
from internvl.train.trainer import InternVLTrainer

logger = logging.getLogger(__name__)


def read_base_files(flags: dict, preprocessor: dict) -> AuxiliaryFiles:
    """Read the files besides weights that results take over from the base.

    Args:
        flags: of the run, which name the base.
        preprocessor: this run's settings, which replace the base's.
    """
    if path := flags["model_name_or_path"]:
        files = read_auxiliary_files(path)
    else:
        vision_files = read_auxiliary_files(flags["vision_path"])
        vision_files.remove("code")
        files = compose_auxiliary_files(vision_files, read_auxiliary_files(flags["llm_path"]))
    set_tile_size(files, preprocessor["size"])
    update_preprocessor_config(files, preprocessor)
    return files


def build_trainer(
    model: InternVLChatModel,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    run_record: RunRecord,
    trainer_class: type[InternVLTrainer] = InternVLTrainer,
    collator: Callable = collate_rows,
    evaluation: RunEvaluation | None = None,
    **kwargs,
) -> InternVLTrainer:
    """Plan the first epoch and the evaluations, log the plans and create the trainer.

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
    if evaluation and evaluation.data:
        log_evaluation_plan(model, evaluation.data, evaluation.settings, schedule, training_args)
    model.loss_reduction = data_args.loss_reduction
    collator = partial(collator, pad_id=get_pad_id(tokenizer), image_token_id=model.img_context_token_id)
    if data_args.use_packed_ds and data_args.strict_mode:
        collator = partial(collator, max_item_length=data_args.max_packed_tokens)
    preprocessor = build_preprocessor_config(data_args.force_image_size, *NORMALIZATION_STATS[data_args.normalize_type])
    base_files = read_base_files(run_record.flags, preprocessor) if training_args.should_save else AuxiliaryFiles()
    max_skipped = count_max_skipped_samples(data_args, len(data.lengths))
    if training_args.deepspeed:
        num_trainable = sum(count_elements(parameter) for parameter in model.parameters() if parameter.requires_grad)
        limit_reduce_bucket(training_args.hf_deepspeed_config.config, num_trainable)
    return trainer_class(
        model=model,
        args=training_args,
        train_dataset=data.dataset,
        data_collator=collator,
        processing_class=tokenizer,
        schedule=schedule,
        skipped_samples=SkippedSampleReport(map(str, data.skipped_samples), max_skipped),
        preprocessor=preprocessor,
        auxiliary_files=base_files,
        run_record=run_record,
        accept_changed_data=data_args.accept_changed_data,
        all_gather_loss=data_args.loss_reduction_all_gather,
        evaluation=evaluation,
        **kwargs,
    )


def log_evaluation_plan(
    model: InternVLChatModel,
    data: EvaluationData,
    settings: EvaluationSettings,
    schedule: DataSchedule,
    args: TrainingArguments,
) -> None:
    """Log what an evaluation runs, and the estimated time of all evaluations."""
    cost = describe_model_cost(model, schedule.layout.sample_cost, compute_forward_cost(model))
    dtype = next(model.language_model.parameters()).dtype
    speed = measure_device_speed(args.device, dtype)
    estimate = estimate_evaluation(data, settings, args.world_size, cost, speed)
    num_steps = count_run_steps(schedule, 0, 0, args.num_train_epochs, args.max_steps)
    step_seconds = estimate_step_seconds(schedule.plan(0), schedule.lengths, cost, speed)
    num_evaluations = count_evaluations(args, num_steps, len(schedule.plan(0)))
    table = format_evaluation_plan(data, estimate, num_evaluations, num_steps, step_seconds, "this device")
    logger.info("Evaluation plan:\n%s", table)
