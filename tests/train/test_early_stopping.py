"""Early stopping, and schedulers that follow a metric, across resumed runs."""

import shutil

import pytest
import torch
from helpers.evaluation_runs import read_evaluations, read_state, write_evaluation_meta
from helpers.training_runs import TRAIN_ADAPTERS, load_weights, read_losses, read_step_logs, run_training

# The loss falls while these samples are trained. As a greater one is better here, the first evaluation is the best.
FIRST_IS_BEST = ["--metric_for_best_model", "eval/loss", "--greater_is_better", "True"]
EVERY_STEP = "--eval_strategy steps --eval_steps 1 --save_steps 1".split()


@pytest.fixture(scope="module")
def meta(tiny_inputs, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("evaluation")
    return ["--eval_meta_path", str(write_evaluation_meta(tiny_inputs, folder, metric=None))]


def remove_results_after(output, step: int) -> None:
    """Turn a run's folder into that of a run which was killed after this step's checkpoint."""
    for path in output.glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)
    for name in ("config.json", "trainer_state.json", "eval_results.json"):
        (output / name).unlink()


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
def test_run_stops_early_and_does_not_start_again(tiny_inputs, meta, tmp_path, ranks):
    output, flags = tmp_path / "out", [*TRAIN_ADAPTERS, *meta, *EVERY_STEP, *FIRST_IS_BEST]
    flags += ["--save_steps", "5", "--early_stopping_patience", "2"]
    done = run_training(tiny_inputs, output, *flags, ranks=ranks)
    assert sorted(read_evaluations(output)) == [1, 2, 3]
    assert "Saved the model of step 3 to" in done.stdout
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"], "the end is saved"
    again = run_training(tiny_inputs, output, *flags, ranks=ranks)
    assert "Training has finished" in again.stdout and "Nothing to do: the model is in" in again.stdout


@pytest.mark.multiprocess
def test_more_patience_continues_a_stopped_run(tiny_inputs, meta, tmp_path):
    output, flags = tmp_path / "out", [*TRAIN_ADAPTERS, *meta, *EVERY_STEP, *FIRST_IS_BEST]
    run_training(tiny_inputs, output, *flags, "--early_stopping_patience", "2")
    done = run_training(tiny_inputs, output, *flags, "--early_stopping_patience", "4")
    assert "Resuming from checkpoint-3" in done.stdout
    assert sorted(read_evaluations(output)) == [1, 2, 3, 4, 5], "two evaluations more without an improvement"


@pytest.mark.multiprocess
def test_resumed_run_keeps_its_patience(tiny_inputs, meta, tmp_path):
    output, flags = tmp_path / "out", [*TRAIN_ADAPTERS, *meta, *EVERY_STEP, *FIRST_IS_BEST]
    flags += ["--early_stopping_patience", "3"]
    run_training(tiny_inputs, output, *flags)
    expected = load_weights(output)
    remove_results_after(output, 3)
    run_training(tiny_inputs, output, *flags)
    assert sorted(read_evaluations(output)) == [1, 2, 3, 4]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_weights(output).items())
    # The run was killed after the last checkpoint, before its model was saved.
    remove_results_after(output, 4)
    done = run_training(tiny_inputs, output, *flags)
    assert "Saved the model of step 4 to" in done.stdout and "step 5/" not in done.stdout
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_weights(output).items())


# scheduler -> arguments, rate of each step relative to the first one; `greedy` raises the rate after an improvement
SCHEDULERS = {
    "reduce_lr_on_plateau": ('{"patience": 0, "factor": 0.5, "threshold": 0}', [1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]),
    "greedy": ('{"patience": 0, "factor": 0.5}', [1, 2, 1, 1 / 2, 1 / 4, 1 / 8]),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("deepspeed", [[], ["--deepspeed", "zero_stage2_config.json"]], ids=["none", "zero2"])
def test_scheduler_follows_the_metric(tiny_inputs, meta, tmp_path, name, deepspeed):
    output, flags = tmp_path / "out", [*TRAIN_ADAPTERS, *meta, *EVERY_STEP, *FIRST_IS_BEST, *deepspeed]
    arguments, factors = SCHEDULERS[name]
    flags += ["--lr_scheduler_type", name, "--lr_scheduler_kwargs", arguments, "--backbone_lr", "3e-3"]
    run_training(tiny_inputs, output, *flags)
    rates = [entry["learning_rate"] for entry in read_step_logs(output)]
    assert rates == pytest.approx([3e-3 * factor for factor in factors])
    losses, expected = read_losses(output), load_weights(output)
    remove_results_after(output, 3)
    run_training(tiny_inputs, output, *flags)
    assert [entry["learning_rate"] for entry in read_step_logs(output)] == rates
    assert read_losses(output) == losses
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_weights(output).items())
    assert read_state(output)["best_global_step"] == 1


@pytest.mark.multiprocess
def test_resumed_run_may_change_the_kind_of_scheduler(tiny_inputs, meta, tmp_path):
    output, flags = tmp_path / "out", [*TRAIN_ADAPTERS, *meta, *"--eval_strategy steps --eval_steps 2".split()]
    run_training(tiny_inputs, tmp_path / "linear", *flags, "--lr_scheduler_type", "linear")
    expected = [entry["learning_rate"] for entry in read_step_logs(tmp_path / "linear")]
    run_training(tiny_inputs, output, *flags, "--lr_scheduler_type", "reduce_lr_on_plateau")
    remove_results_after(output, 3)
    run_training(tiny_inputs, output, *flags, "--lr_scheduler_type", "linear")
    rates = [entry["learning_rate"] for entry in read_step_logs(output)]
    assert rates == pytest.approx([1e-3] * 3 + expected[3:])
    remove_results_after(output, 3)
    run_training(tiny_inputs, output, *flags, "--lr_scheduler_type", [*SCHEDULERS][-1], "--learning_rate", "1e-4")
    assert [entry["learning_rate"] for entry in read_step_logs(output)][3:] == pytest.approx([1e-4] * 3)
