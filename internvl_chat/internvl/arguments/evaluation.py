"""Flags on evaluation during training, beside those of transformers."""

from dataclasses import dataclass

from internvl.arguments.flags import option


@dataclass
class EvaluationArguments:
    """Flags on evaluation sets, answers and early stopping; a base of `TrainingArguments`."""

    eval_meta_path: str | None = option(None, "JSON file that lists the evaluation sets, in the format of --meta_path")
    eval_share: float = option(
        0.0, "share of the training records that is held out for evaluation, chosen by a hash of each record"
    )
    eval_num_samples: int | None = option(
        None, "questions per evaluation set that are answered, the same in every evaluation; 0: none; default: all"
    )
    eval_max_new_tokens: int = option(128, "maximum number of tokens of a generated answer")
    eval_base_answers: str | None = option(
        None,
        "JSON file that lists datasets of prompts; the base model answers them once, and eval/forgetting is the loss "
        "on these answers",
    )
    early_stopping_patience: int | None = option(
        None, "evaluations without improvement of --metric_for_best_model after which the run ends; default: never"
    )
    early_stopping_threshold: float = option(0.0, "smallest change of --metric_for_best_model that is an improvement")
