"""Flags on when a run evaluates, which model is its best one, and when it stops early.

transformers checks them, too, but some only after the model is loaded, and in several lines.
"""

from typing import TYPE_CHECKING, Any

from internvl.arguments.schedulers import NEED_METRIC

if TYPE_CHECKING:
    from internvl.arguments.training import TrainingArguments

LOG_PREFIX = "eval_"  # of evaluation metrics in transformers' logs; its reporters show `eval/`, as this package does
# Last parts of metrics' names, and how those of their further numbers and intervals begin: `cer_mean`, `cer_low`.
SMALLER_IS_BETTER = ("loss", "nll_loss", "perplexity", "forgetting", "cer", "wer")


def normalize_metric(name: str) -> str:
    """Return a metric's name in transformers' logs.

    `eval/docvqa/anls`, `eval_docvqa/anls` and `docvqa/anls` are the same metric.
    """
    return LOG_PREFIX + name.removeprefix(LOG_PREFIX).removeprefix("eval/")


def is_greater_better(metric: str) -> bool:
    """Check whether a greater value of a metric is better."""
    name = metric.removeprefix(LOG_PREFIX).rpartition("/")[2]
    return not any(name == smaller or name.startswith(f"{smaller}_") for smaller in SMALLER_IS_BETTER)


def prepare_evaluation_flags(args: "TrainingArguments") -> None:
    """Refuse contradictory flags, before transformers does; set the metric of the best model.

    Raises:
        ValueError: a flag requires another one.
    """
    evaluates, saves = (str(getattr(value, "value", value)) for value in (args.eval_strategy, args.save_strategy))
    scheduler = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    users = {  # flag that uses the metric of the best model -> whether it is set
        "--load_best_model_at_end True": args.load_best_model_at_end,
        "--save_strategy best": saves == "best",
        f"--early_stopping_patience {args.early_stopping_patience}": args.early_stopping_patience is not None,
        f"--lr_scheduler_type {scheduler}": scheduler in NEED_METRIC,
    }
    set_users = [flag for flag, is_set in users.items() if is_set]
    repeated = [*set_users]
    if args.metric_for_best_model:
        repeated.append(f"--metric_for_best_model {args.metric_for_best_model}")
    if args.eval_delay:
        repeated.append(f"--eval_delay {args.eval_delay:g}")
    if repeated and evaluates == "no":
        raise ValueError(f"{repeated[0]} requires --eval_strategy steps or epoch.")
    if args.eval_steps and evaluates != "steps":
        raise ValueError(f"--eval_steps {args.eval_steps:g} requires --eval_strategy steps, not {evaluates}.")
    if args.early_stopping_threshold and args.early_stopping_patience is None:
        raise ValueError(
            f"--early_stopping_threshold {args.early_stopping_threshold:g} requires --early_stopping_patience."
        )
    if args.load_best_model_at_end:
        check_saved_evaluations(args, evaluates, saves)
    if args.greater_is_better is not None and not (args.metric_for_best_model or set_users):
        raise ValueError(f"--greater_is_better {args.greater_is_better} requires --metric_for_best_model.")
    if set_users and not args.metric_for_best_model:
        args.metric_for_best_model = "loss"
    if args.metric_for_best_model:
        args.metric_for_best_model = normalize_metric(args.metric_for_best_model)
        if args.greater_is_better is None:
            args.greater_is_better = is_greater_better(args.metric_for_best_model)
    if scheduler in NEED_METRIC:
        set_scheduler_defaults(args, scheduler)


def check_saved_evaluations(args: "TrainingArguments", evaluates: str, saves: str) -> None:
    """Check that --load_best_model_at_end finds a checkpoint of each evaluated model."""
    flag = "--load_best_model_at_end True"
    if saves == "no":
        raise ValueError(f"{flag} requires saved checkpoints: --save_strategy no saves none.")
    if args.save_only_model and args.deepspeed:
        raise ValueError(f"{flag} is not supported with --save_only_model True under DeepSpeed.")
    if saves == "best":
        return
    if saves != evaluates:
        raise ValueError(
            f"{flag} requires the same --save_strategy ({saves}) and --eval_strategy ({evaluates}), or --save_strategy "
            "best."
        )
    eval_steps, save_steps = args.eval_steps or args.logging_steps, args.save_steps
    is_share = (eval_steps < 1, save_steps < 1)
    remainder = round(save_steps * 1_000_000) % round(eval_steps * 1_000_000)  # of shares of the run, too
    if evaluates == "steps" and (is_share[0] != is_share[1] or remainder):
        raise ValueError(
            f"{flag} requires --save_steps {save_steps:g} to be a multiple of --eval_steps {eval_steps:g}."
        )


def set_scheduler_defaults(args: "TrainingArguments", scheduler: str) -> None:
    """Set whether a scheduler follows an accuracy or a loss.

    transformers' default lower bound of `greedy` is 1e-3, above most learning rates of fine-tuning.
    """
    kwargs = args.lr_scheduler_kwargs or {}
    assert isinstance(kwargs, dict)  # parsed
    defaults: dict[str, Any] = {"mode": "max" if args.greater_is_better else "min"}
    if scheduler == "greedy":
        defaults["min_lr"] = 0.0
    args.lr_scheduler_kwargs = defaults | kwargs
