"""Evaluate the model of a run: which sets, with which settings, before which step."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_utils import IntervalStrategy

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.evaluation_strategy import LOG_PREFIX
from internvl.arguments.training import TrainingArguments
from internvl.data.images import NORMALIZATION_STATS
from internvl.data.schema import BASE_ANSWERS_SPLIT, is_trained, load_meta
from internvl.data.skipped_samples import SkippedSampleReport
from internvl.evaluation.base_answers import prepare_base_answers
from internvl.evaluation.evaluation_data import (
    EvaluationData,
    check_usable_samples,
    collect_evaluation_sets,
    join_evaluation_data,
    make_skipped_report,
    open_evaluation_data,
)
from internvl.evaluation.results import EVALUATION_DIR
from internvl.evaluation.scores import METRICS
from internvl.evaluation.settings import EvaluationSettings
from internvl.metrics.step_timer import NOT_OF_STEP
from internvl.model.internvl_chat import InternVLChatModel
from internvl.train.build_data import TrainingData, build_evaluation
from internvl.train.run_reports import EVALUATION_SECONDS

if TYPE_CHECKING:
    from internvl.train.trainer import InternVLTrainer

LOSS_METRICS = ("loss", "perplexity", "token_accuracy")  # of each evaluation set, and over all of them

# -- before anything is loaded -----------------------------------------------------------------------------------------


def check_evaluation_flags(
    data_args: DataTrainingArguments, args: TrainingArguments, metrics: Sequence[str] = LOSS_METRICS
) -> None:
    """Check that a run that evaluates has evaluation sets, and the metric of its best model.

    Reads only meta files.

    Args:
        metrics: that each evaluation set has, whatever its metric of answers.

    Raises:
        ValueError: with what to add.
    """
    meta = collect_evaluation_sets(data_args, args)
    sources = [*meta, *(f"--{name}" for name in ("eval_share", "eval_base_answers") if getattr(args, name))]
    evaluates = args.do_eval or args.eval_on_start
    if evaluates and not sources:
        strategy = IntervalStrategy(args.eval_strategy).value
        flag = "--do_eval True" if args.do_eval and strategy == "no" else f"--eval_strategy {strategy}"
        raise ValueError(
            f"{flag if args.do_eval else '--eval_on_start True'} requires an evaluation set: add --eval_meta_path, "
            '--eval_share, or "split": "eval" to an entry of --meta_path.'
        )
    if sources and not evaluates:
        raise ValueError(
            f"evaluation sets ({', '.join(sources)}) are not evaluated: add --eval_strategy steps or epoch, or "
            "--do_eval True for one evaluation at the end."
        )
    if args.metric_for_best_model:
        check_metric(args.metric_for_best_model, list_metrics(meta, data_args, args, metrics))


def list_metrics(
    meta: Mapping[str, dict], data_args: DataTrainingArguments, args: TrainingArguments, metrics: Sequence[str]
) -> list[str]:
    """List the metrics of the evaluation sets."""
    base_answers = [name for name, entry in meta.items() if entry.get("split") == BASE_ANSWERS_SPLIT]
    sets = {name: entry for name, entry in meta.items() if name not in base_answers}
    if args.eval_share and data_args.meta_path:
        sets |= {name: entry for name, entry in load_meta(data_args.meta_path).items() if is_trained(entry)}
    listed = [*metrics] if sets else []
    for name, entry in sets.items():
        answered = list_answer_metrics(entry["metric"]) if entry.get("metric") and args.eval_num_samples != 0 else []
        listed += [f"{name}/{metric}" for metric in (*metrics, *answered)]
    return listed + (["forgetting"] if base_answers or args.eval_base_answers else [])


def list_answer_metrics(metric: str) -> list[str]:
    """List the numbers that a metric of answers has in an evaluation."""
    return [metric, *(f"{metric}_{name}" for name in ("low", "high", *METRICS[metric].detail_names))]


def check_metric(metric_for_best_model: str, metrics: Sequence[str]) -> None:
    """Raise a ValueError if no evaluation set has the metric of the best model."""
    name = metric_for_best_model.removeprefix(LOG_PREFIX)
    if name not in metrics:
        listed = ", ".join(f"eval/{metric}" for metric in metrics)
        raise ValueError(f"--metric_for_best_model eval/{name} is invalid: expected one of {listed:.800}.")


# -- of a run ----------------------------------------------------------------------------------------------------------


@dataclass
class RunEvaluation:
    """The evaluation sets of a run, and how they are run through the model.

    Attributes:
        data: None until the answers of the base model are recorded, if there are no other sets.
        open_fn: opens further sets: name -> meta entry.
    """

    data: EvaluationData | None
    settings: EvaluationSettings
    data_args: DataTrainingArguments
    open_fn: Callable[[Mapping[str, dict]], EvaluationData]


def build_run_evaluation(
    data: TrainingData,
    data_args: DataTrainingArguments,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    model: InternVLChatModel,
    *dataset_options: Any,
) -> RunEvaluation | None:
    """Open and measure the evaluation sets of a run. A collective.

    Args:
        data: of the training, whose held-out records are evaluated.
        dataset_options: class of datasets and untrained tokens, see `build_evaluation_data`.

    Returns:
        None if there are none.
    """
    evaluation_data = build_evaluation(data, data_args, args, tokenizer, model.num_image_token, *dataset_options)
    if evaluation_data is None and not args.eval_base_answers:
        return None
    skipped = make_skipped_report(evaluation_data, data_args) if evaluation_data else SkippedSampleReport([], 0)
    settings = EvaluationSettings.from_flags(
        *(data_args, args, args.per_device_eval_batch_size, NORMALIZATION_STATS[data_args.normalize_type]),
        report_skipped_fn=skipped.add,
        num_workers=args.dataloader_num_workers,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),  # a flag from 5.17 on
    )

    def open_sets(meta: Mapping[str, dict]) -> EvaluationData:
        return open_evaluation_data(meta, data_args, tokenizer, model.num_image_token, (), *dataset_options)

    return RunEvaluation(evaluation_data, settings, data_args, open_sets)


def prepare_model(trainer: "InternVLTrainer") -> None:
    """Prepare the model of a run that does not train for its evaluation. A collective."""
    if is_deepspeed_zero3_enabled():  # an engine gathers the weights that each module needs
        deepspeed_init(trainer, num_training_steps=0, inference=True)
        trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    else:
        # pyrefly: ignore[bad-argument-type]  # transformers wraps `to`: the checker loses `self`
        trainer.model.to(trainer.args.device)
    add_base_answers(trainer)


def add_base_answers(trainer: "InternVLTrainer") -> None:
    """Record the answers of the base model, once; add them to the evaluation sets. A collective."""
    evaluation, args = trainer.evaluation, trainer.args
    if evaluation is None or not args.eval_base_answers:
        return
    settings = replace(evaluation.settings, autocast_fn=trainer.evaluation_autocast)
    base_answers = prepare_base_answers(
        *(trainer.model, trainer.processing_class, args.eval_base_answers, trainer.checkpoints.output_dir),
        *(evaluation.data_args, settings, trainer.state.global_step > 0),
    )
    added = evaluation.open_fn(base_answers)
    evaluation.data = data = join_evaluation_data(evaluation.data, added) if evaluation.data else added
    check_usable_samples(data, evaluation.data_args)
    skipped = make_skipped_report(data, evaluation.data_args)
    evaluation.settings = replace(evaluation.settings, report_skipped_fn=skipped.add)


def evaluate_run(trainer: "InternVLTrainer") -> dict[str, float]:
    """Evaluate the model on all evaluation sets. A collective.

    The time counts neither as a step nor as a stall.

    Returns:
        Metrics with the prefix `eval_`, and the seconds.
    """
    evaluation, step = trainer.evaluation, trainer.state.global_step
    assert evaluation is not None and evaluation.data is not None  # flags are checked
    folder = trainer.checkpoints.output_dir / EVALUATION_DIR / f"step-{step}"
    settings = replace(
        evaluation.settings,
        autocast_fn=trainer.evaluation_autocast,
        check_stop_fn=trainer.graceful_stop.check_signals,
    )
    trainer.metrics.timer.mark(NOT_OF_STEP)
    start = time.monotonic()
    try:
        with trainer.watchdog.during("evaluation"):
            metrics = trainer.measure(evaluation.data, settings, folder)
    finally:
        trainer.metrics.timer.mark("other")
    metrics = {f"{LOG_PREFIX}{name}": value for name, value in metrics.items()}
    return {**metrics, EVALUATION_SECONDS: time.monotonic() - start}
