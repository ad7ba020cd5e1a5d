"""Runs that evaluate while they train."""

import json
import shutil
import signal

import pytest
import torch
from helpers.evaluation_runs import FOLLOW_LOSS, read_evaluations, read_state, write_evaluation_meta
from helpers.paths import TESTS_DIR
from helpers.training_runs import TRAIN_ADAPTERS, ZERO_FLAGS, load_weights, read_losses, run_training

from internvl.runtime.signals import PREEMPTED_EXIT_STATUS

PROGRAM = TESTS_DIR / "programs/interrupted_evaluation.py"


@pytest.fixture(scope="module")
def evaluation_flags(tiny_inputs, tmp_path_factory) -> list[str]:
    meta = write_evaluation_meta(tiny_inputs, tmp_path_factory.mktemp("evaluation"))
    return ["--eval_meta_path", str(meta), *FOLLOW_LOSS]


@pytest.fixture(scope="module")
def loss_meta(tiny_inputs, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("losses")
    return ["--eval_meta_path", str(write_evaluation_meta(tiny_inputs, folder, metric=None))]


@pytest.fixture(scope="module")
def loss_flags(loss_meta) -> list[str]:
    return [*loss_meta, *FOLLOW_LOSS]


def assert_equal_weights(output, expected) -> None:
    weights = load_weights(expected)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_weights(output).items())


# Dropout, drop path, workers that read ahead, gradient accumulation
NOISE = "--drop_path_rate 0.2 --llm_lora_dropout 0.1 --dataloader_num_workers 1 --gradient_accumulation_steps 2".split()


@pytest.mark.multiprocess
@pytest.mark.parametrize("zero", ZERO_FLAGS)
def test_evaluation_changes_no_training_step(tiny_inputs, evaluation_flags, tmp_path, zero):
    output, plain = tmp_path / "out", tmp_path / "plain"
    flags = [*TRAIN_ADAPTERS, *NOISE, *ZERO_FLAGS[zero]]
    run_training(tiny_inputs, plain, *flags, ranks=2)
    done = run_training(tiny_inputs, output, *flags, *evaluation_flags, "--eval_on_start", "True", ranks=2)
    assert read_losses(output) == read_losses(plain)
    assert_equal_weights(output, plain)
    evaluations = read_evaluations(output)
    assert sorted(evaluations) == [0, 2, 4, 6]
    names = {"loss", "held/loss", "held/exact_match", "held/exact_match_low", "held/exact_match_high"}
    assert {f"eval/{name}" for name in names} <= evaluations[2].keys()
    assert evaluations[6]["eval/held/loss"] < evaluations[0]["eval/held/loss"], "these records are trained"
    assert sorted(path.name for path in (output / "evaluation").iterdir()) == [f"step-{n}" for n in (0, 2, 4, 6)]
    in_log = {entry["step"]: entry for entry in read_state(output)["log_history"] if "eval_loss" in entry}
    assert in_log[4]["eval_held/loss"] == evaluations[4]["eval/held/loss"]
    assert f"evaluation at step 4: held  loss {evaluations[4]['eval/held/loss']:.4f}" in done.stdout
    results = json.loads((output / "eval_results.json").read_text())
    assert results["eval_loss"] == evaluations[6]["eval/loss"]


# -- interrupted evaluations -------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", [4, 6])
def test_signal_during_an_evaluation_saves_and_resumes(tiny_inputs, loss_flags, tmp_path, monkeypatch, ranks, step):
    """At step 6, the last one, the resumed run only evaluates."""
    expected, output = tmp_path / "expected", tmp_path / "out"
    flags = [*TRAIN_ADAPTERS, *loss_flags, "--save_steps", "100"]
    run_training(tiny_inputs, expected, *flags, ranks=ranks)
    monkeypatch.setenv("INTERRUPTED", f"{ranks - 1} {step} {signal.SIGTERM.value}")
    done = run_training(tiny_inputs, output, *flags, ranks=ranks, entry=PROGRAM, status=PREEMPTED_EXIT_STATUS)
    assert f"Stopping after step {step} (SIGTERM): the same command resumes from checkpoint-{step}" in done.stdout
    assert sorted(read_evaluations(output)) == list(range(2, step, 2)), "the evaluation is abandoned"
    run_training(tiny_inputs, output, *flags, ranks=ranks)
    assert sorted(read_evaluations(output)) == ([2, 6] if step == 4 else [2, 4, 6])
    assert read_losses(output) == read_losses(expected)
    assert_equal_weights(output, expected)
    assert read_evaluations(output)[6]["eval/loss"] == read_evaluations(expected)[6]["eval/loss"]


@pytest.mark.multiprocess
def test_killed_evaluation_is_repeated(tiny_inputs, loss_flags, tmp_path, monkeypatch):
    expected, output = tmp_path / "expected", tmp_path / "out"
    flags = [*TRAIN_ADAPTERS, *loss_flags, "--save_steps", "3"]
    run_training(tiny_inputs, expected, *flags)
    monkeypatch.setenv("INTERRUPTED", f"0 4 {signal.SIGKILL.value}")
    run_training(tiny_inputs, output, *flags, entry=PROGRAM, status=-signal.SIGKILL)
    assert sorted(read_evaluations(output)) == [2]
    done = run_training(tiny_inputs, output, *flags)
    assert "Resuming from checkpoint-3" in done.stdout
    assert sorted(read_evaluations(output)) == [2, 4, 6]
    assert read_losses(output) == read_losses(expected)
    assert_equal_weights(output, expected)


@pytest.mark.multiprocess
def test_results_of_later_steps_are_dropped_when_resuming(tiny_inputs, loss_flags, tmp_path):
    output, flags = tmp_path / "out", [*TRAIN_ADAPTERS, *loss_flags]
    run_training(tiny_inputs, output, *flags)
    last = tmp_path / "other/checkpoint-3"
    shutil.copytree(output / "checkpoint-3", last)
    run_training(tiny_inputs, output, *flags, "--resume_from_checkpoint", str(last), "--max_steps", "4")
    assert sorted(read_evaluations(output)) == [2, 4]
    assert sorted(path.name for path in (output / "evaluation").iterdir()) == ["step-2", "step-4"]


# -- when a run evaluates ----------------------------------------------------------------------------------------------

STRATEGIES = {
    "epochs, the last one unfinished": ("--eval_strategy epoch --max_steps 6", [4, 6]),
    "share of the run": ("--eval_strategy steps --eval_steps 0.5", [3, 6]),
    "delay": ("--eval_strategy steps --eval_steps 1 --eval_delay 4", [4, 5, 6]),
    "delay in epochs": ("--eval_strategy epoch --max_steps 10 --eval_delay 2", [8, 10]),
    "once": ("--do_eval True", [6]),
    "only at the start": ("--eval_on_start True", [0]),
    "upstream's name": ("--evaluation_strategy steps --eval_steps 4", [4, 6]),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize(("flags", "steps"), STRATEGIES.values(), ids=STRATEGIES)
def test_run_evaluates_at_these_steps(tiny_inputs, loss_meta, tmp_path, flags, steps):
    run_training(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, *loss_meta, *flags.split(), "--save_strategy", "no")
    assert sorted(read_evaluations(tmp_path / "out")) == steps


@pytest.fixture(scope="module")
def loss_before_training(tiny_inputs, loss_meta, tmp_path_factory) -> float:
    output = tmp_path_factory.mktemp("start") / "out"
    run_training(tiny_inputs, output, *TRAIN_ADAPTERS, *loss_meta, "--eval_on_start", "True")
    return read_evaluations(output)[0]["eval/held/loss"]


@pytest.mark.multiprocess
@pytest.mark.parametrize("zero", ZERO_FLAGS)
def test_evaluation_without_training(tiny_inputs, loss_meta, loss_before_training, tmp_path, zero):
    output = tmp_path / "out"
    flags = [*loss_meta, *TRAIN_ADAPTERS, "--do_train", "False", "--do_eval", "True", *ZERO_FLAGS[zero]]
    done = run_training(tiny_inputs, output, *flags, ranks=2)
    (step,), (metrics,) = zip(*read_evaluations(output).items(), strict=True)
    results = json.loads((output / "eval_results.json").read_text())
    assert step == 0 and results["eval_loss"] == metrics["eval/loss"]
    assert (output / "evaluation/step-0/metrics.json").is_file() and not (output / "config.json").exists()
    assert "evaluation at step 0" in done.stdout and "exiting without" not in done.stdout
    assert metrics["eval/held/loss"] == pytest.approx(loss_before_training, abs=1e-6)


@pytest.mark.multiprocess
@pytest.mark.parametrize("zero", ["none", "zero3"])
def test_base_answers_are_recorded_once_and_change_no_step(tiny_inputs, loss_meta, tmp_path, zero):
    output, plain = tmp_path / "out", tmp_path / "plain"
    flags = [*TRAIN_ADAPTERS, *NOISE, *ZERO_FLAGS[zero]]
    run_training(tiny_inputs, plain, *flags, ranks=2)
    flags += ["--eval_base_answers", loss_meta[1], *FOLLOW_LOSS, "--metric_for_best_model", "forgetting"]
    run_training(tiny_inputs, output, *flags, ranks=2)
    assert read_losses(output) == read_losses(plain)
    assert_equal_weights(output, plain)
    evaluations = read_evaluations(output)
    assert sorted(evaluations) == [2, 4, 6] and evaluations[6]["eval/forgetting"] > 0
    (recorded,) = (output / "evaluation/base_answers").glob("*.jsonl")
    before = recorded.stat()
    shutil.rmtree(output / "checkpoint-6")
    for name in ("trainer_state.json", "config.json"):
        (output / name).unlink()
    run_training(tiny_inputs, output, *flags, ranks=2)
    assert recorded.stat() == before
    assert [read_evaluations(output)[step]["eval/forgetting"] for step in (2, 4, 6)] == [
        evaluations[step]["eval/forgetting"] for step in (2, 4, 6)
    ]


@pytest.mark.multiprocess
def test_signal_during_the_evaluation_at_the_start_stops_after_the_first_step(
    tiny_inputs, loss_flags, tmp_path, monkeypatch
):
    output, flags = tmp_path / "out", [*TRAIN_ADAPTERS, *loss_flags, "--eval_on_start", "True"]
    monkeypatch.setenv("INTERRUPTED", f"0 0 {signal.SIGTERM.value}")
    done = run_training(tiny_inputs, output, *flags, entry=PROGRAM, status=PREEMPTED_EXIT_STATUS)
    assert "Stopping after step 1 (SIGTERM): the same command resumes from checkpoint-1" in done.stdout
    run_training(tiny_inputs, output, *flags)
    assert sorted(read_evaluations(output)) == [2, 4, 6]
