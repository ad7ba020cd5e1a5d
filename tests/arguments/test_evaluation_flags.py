"""Flags on when a run evaluates, its best model and early stopping, checked before anything is loaded."""

import json
from pathlib import Path

import pytest
from helpers.metric_records import read_records
from transformers.trainer_utils import SchedulerType

from internvl.arguments.evaluation_strategy import is_greater_better
from internvl.arguments.training import parse_args
from internvl.evaluation.scores import METRICS, compute_details
from internvl.train.run_evaluation import check_evaluation_flags, list_answer_metrics

STEPS = "--eval_strategy steps --eval_steps 50 --save_steps 100"
BEST = f"{STEPS} --load_best_model_at_end True"
# flags -> message
CONTRADICTIONS = {
    "--load_best_model_at_end True": "--load_best_model_at_end True requires --eval_strategy steps or epoch.",
    "--save_strategy best": "--save_strategy best requires --eval_strategy steps or epoch.",
    "--early_stopping_patience 2": "--early_stopping_patience 2 requires --eval_strategy steps or epoch.",
    "--lr_scheduler_type reduce_lr_on_plateau": "--lr_scheduler_type reduce_lr_on_plateau requires --eval_strategy",
    "--metric_for_best_model loss": "--metric_for_best_model loss requires --eval_strategy steps or epoch.",
    "--eval_delay 3": "--eval_delay 3 requires --eval_strategy steps or epoch.",
    "--eval_steps 50": "--eval_steps 50 requires --eval_strategy steps, not no.",
    "--eval_strategy epoch --eval_steps 50": "--eval_steps 50 requires --eval_strategy steps, not epoch.",
    f"{STEPS} --early_stopping_threshold 0.1": "--early_stopping_threshold 0.1 requires --early_stopping_patience.",
    f"{STEPS} --greater_is_better True": "--greater_is_better True requires --metric_for_best_model.",
    f"{BEST} --save_strategy no": "requires saved checkpoints: --save_strategy no saves",
    f"{BEST} --save_strategy epoch": "requires the same --save_strategy .epoch. and --eval_strategy .steps.",
    f"{BEST} --save_steps 120": "--save_steps 120 to be a multiple of --eval_steps 50.",
    f"{BEST} --save_steps 0.5": "--save_steps 0.5 to be a multiple of --eval_steps 50.",
    f"{BEST} --save_steps 0.5 --eval_steps 0.2": "--save_steps 0.5 to be a multiple of --eval_steps 0.2.",
}


def parse(flags: str):
    return parse_args(["--output_dir", "out", *flags.split()])[2]


@pytest.mark.parametrize(("flags", "message"), CONTRADICTIONS.items())
def test_contradictory_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(flags)
    assert "\n" not in str(error.value)


ACCEPTED = [
    STEPS,
    BEST,
    f"{BEST} --save_strategy best",
    f"{BEST} --save_steps 0.4 --eval_steps 0.1",
    "--eval_strategy epoch --save_strategy epoch --load_best_model_at_end True --early_stopping_patience 2",
    "--eval_on_start True",
    "--do_train False --do_eval True",
]


@pytest.mark.parametrize("flags", ACCEPTED)
def test_flags_are_accepted(flags):
    assert parse(flags).do_eval == (flags != "--eval_on_start True")


@pytest.mark.parametrize("name", ["eval/docvqa/anls", "eval_docvqa/anls", "docvqa/anls"])
def test_metric_has_the_name_of_the_logs(name):
    args = parse(f"{STEPS} --metric_for_best_model {name}")
    assert args.metric_for_best_model == "eval_docvqa/anls" and args.greater_is_better is True


@pytest.mark.parametrize(("name", "expected"), [("nll_loss", False), ("rewards/accuracies", True)])
def test_greater_is_better_is_known_for_metrics_of_pairs(name, expected):
    assert is_greater_better(f"eval_{name}") == is_greater_better(f"eval_set/{name}") == expected


@pytest.mark.parametrize("name", METRICS)
def test_greater_is_better_is_known_by_the_metric(name):
    assert is_greater_better(f"eval_set/{name}") == METRICS[name].greater_is_better
    args = parse(f"{STEPS} --metric_for_best_model set/{name}_low")
    assert args.greater_is_better == METRICS[name].greater_is_better


@pytest.mark.parametrize("metric", ["cer", "wer", "yes_no", "box_iou", "bleu"])
def test_greater_is_better_is_known_of_further_numbers(metric):
    for number in compute_details(metric, read_records(metric)):
        args = parse(f"{STEPS} --metric_for_best_model eval/set/{metric}_{number}")
        assert args.greater_is_better == METRICS[metric].greater_is_better == (metric not in ("cer", "wer"))
    assert is_greater_better("eval_cer_mean/anls") and is_greater_better("eval_certainty")


def test_loss_is_the_default_metric():
    for flags in ("--load_best_model_at_end True", "--save_strategy best", "--early_stopping_patience 1"):
        args = parse(f"{STEPS} {flags}")
        assert args.metric_for_best_model == "eval_loss" and args.greater_is_better is False
    for name in ("loss", "held/perplexity", "forgetting"):
        assert not is_greater_better(f"eval_{name}")
    assert parse(STEPS).metric_for_best_model is None
    assert parse(f"{STEPS} --metric_for_best_model loss --greater_is_better True").greater_is_better is True


def test_greedy_scheduler_follows_the_metric():
    flags = f"{STEPS} --lr_scheduler_type greedy --metric_for_best_model a/anls"
    if "greedy" not in list(SchedulerType):  # transformers < 5.4
        with pytest.raises(ValueError, match="invalid choice: 'greedy'"):
            parse(flags)
        return
    assert parse(flags).lr_scheduler_kwargs == {"mode": "max", "min_lr": 0.0}
    with pytest.raises(ValueError, match="^--lr_scheduler_type greedy requires --eval_strategy"):
        parse("--lr_scheduler_type greedy")


def test_scheduler_follows_the_metric():
    plateau = f"{STEPS} --lr_scheduler_type reduce_lr_on_plateau"
    assert parse(plateau).lr_scheduler_kwargs == {"mode": "min"}
    assert parse(f"{plateau} --metric_for_best_model a/anls").lr_scheduler_kwargs == {"mode": "max"}
    with pytest.raises(ValueError, match="'nothing' is not supported with --lr_scheduler_type reduce_lr_on_plateau"):
        parse_args(["--output_dir", "out", *plateau.split(), "--lr_scheduler_kwargs", '{"nothing": 1}'])
    with pytest.raises(ValueError, match="reduce_lr_on_plateau with --lr_scheduler_kwargs .* is invalid: Factor"):
        parse_args(["--output_dir", "out", *plateau.split(), "--lr_scheduler_kwargs", '{"factor": 2}'])


# -- evaluation sets ---------------------------------------------------------------------------------------------------


@pytest.fixture
def meta_files(tmp_path) -> dict[str, Path]:
    """Write a meta file with training data only, one with both, and one of evaluation sets."""
    entry = {"root": "images", "annotation": "a.jsonl", "repeat_time": 1}
    metas = {
        "train": {"caption": entry},
        "both": {"caption": entry, "held": entry | {"split": "eval"}},
        "eval": {"docvqa": entry | {"metric": "anls"}, "plain": entry},
    }
    for name, meta in metas.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(meta))
    return {name: tmp_path / f"{name}.json" for name in metas}


def check(meta_files: dict[str, Path], flags: str) -> None:
    _, data_args, training_args = parse_args(["--output_dir", "out", *flags.format(**meta_files).split()])
    check_evaluation_flags(data_args, training_args)


METRIC = f"{STEPS} --metric_for_best_model"
MISMATCHES = {
    f"--meta_path {{train}} {STEPS}": "--eval_strategy steps requires an evaluation set: add --eval_meta_path",
    "--meta_path {train} --do_eval True": "--do_eval True requires an evaluation set",
    "--meta_path {train} --eval_on_start True": "--eval_on_start True requires an evaluation set",
    "--meta_path {train} --eval_meta_path {eval}": "evaluation sets .docvqa, plain. are not evaluated: add --eval_str",
    "--meta_path {both}": "evaluation sets .held. are not evaluated",
    "--meta_path {train} --eval_share 0.1": "evaluation sets .--eval_share. are not evaluated",
    f"--meta_path {{train}} --eval_meta_path {{eval}} {METRIC} docvqa/cider": "--metric_for_best_model "
    "eval/docvqa/cider is invalid: expected one of eval/loss, .* eval/docvqa/anls, .* eval/plain/loss",
    f"--meta_path {{train}} --eval_meta_path {{eval}} {METRIC} forgetting": "eval/forgetting is invalid",
    f"--meta_path {{train}} --eval_meta_path {{eval}} {METRIC} docvqa/anls_hgih": "eval/docvqa/anls_hgih is invalid",
    f"--meta_path {{train}} --eval_share 0.1 {METRIC} held/loss": "expected one of .*, eval/caption/loss",
}


@pytest.mark.parametrize(("flags", "message"), MISMATCHES.items())
def test_missing_evaluation_sets_and_metrics_are_refused(meta_files, flags, message):
    with pytest.raises(ValueError, match=message):
        check(meta_files, flags)


MATCHES = [
    f"--meta_path {{both}} {METRIC} eval/held/loss",
    f"--meta_path {{train}} --eval_share 0.1 {METRIC} caption/token_accuracy",
    f"--meta_path {{train}} --eval_meta_path {{eval}} {METRIC} docvqa/anls_low",
    f"--meta_path {{train}} --eval_base_answers {{eval}} {METRIC} forgetting",
    "--meta_path {train}",
]


@pytest.mark.parametrize("flags", MATCHES)
def test_matching_evaluation_sets_are_accepted(meta_files, flags):
    check(meta_files, flags)


@pytest.mark.parametrize("metric", METRICS)
def test_all_numbers_of_a_metric_are_known(metric):
    details = compute_details(metric, read_records(metric))
    expected = [metric, *(f"{metric}_{name}" for name in ("low", "high", *details))]
    assert list_answer_metrics(metric) == expected
