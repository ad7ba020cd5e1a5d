"""The best checkpoint: saved, kept, found after resuming and moving, loaded at the end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.evaluation_runs import read_evaluations, read_state, write_evaluation_meta
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    TRAIN_LLM_AND_PROJECTOR,
    ZERO_FLAGS,
    load_weights,
    run_training,
    run_training_until,
)


def list_checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def flags(tiny_inputs, tmp_path_factory) -> list[str]:
    """Flags of a run whose best model is that of step 2: `perplexity` is greatest there in the first evaluation."""
    meta = write_evaluation_meta(tiny_inputs, tmp_path_factory.mktemp("evaluation"), metric=None)
    strategy = "--eval_strategy steps --eval_steps 2 --save_steps 2 --load_best_model_at_end True"
    # The loss falls while these samples are trained, so a greater loss is better: the first evaluation is the best one.
    metric = "--metric_for_best_model eval/held/loss --greater_is_better True"
    return ["--eval_meta_path", str(meta), *strategy.split(), *metric.split()]


@pytest.mark.multiprocess
def test_best_checkpoint_is_kept_and_loaded(tiny_inputs, flags, tmp_path):
    output = tmp_path / "out"
    done = run_training(tiny_inputs, output, *TRAIN_ADAPTERS, *flags, "--save_total_limit", "1")
    assert list_checkpoints(output) == ["checkpoint-2", "checkpoint-6"], "the best one and the latest one"
    losses = {step: entry["eval/held/loss"] for step, entry in read_evaluations(output).items()}
    assert max(losses, key=losses.get) == 2
    for folder in (output, output / "checkpoint-6"):
        state = read_state(folder)
        assert state["best_model_checkpoint"] == str(output / "checkpoint-2")
        assert (state["best_global_step"], state["best_metric"]) == (2, losses[2])
    saved, best, last = (load_weights(folder) for folder in (output, output / "checkpoint-2", output / "checkpoint-6"))
    assert all(torch.equal(saved[name], best[name]) for name in saved)
    assert not all(torch.equal(saved[name], last[name]) for name in saved)
    assert f"Loaded the best model: checkpoint-2 (eval/held/loss {losses[2]:.4f})" in done.stdout
    assert "Saved the model of step 2 to" in done.stdout
    assert json.loads((output / "eval_results.json").read_text())["eval_held/loss"] == losses[2]
    again = run_training(tiny_inputs, output, *TRAIN_ADAPTERS, *flags, "--save_total_limit", "1")
    assert "Nothing to do: the model is in" in again.stdout


@pytest.mark.multiprocess
def test_resumed_run_in_a_moved_folder_keeps_the_best_checkpoint(tiny_inputs, flags, tmp_path):
    first, moved = tmp_path / "first", tmp_path / "moved"
    limited = [*TRAIN_ADAPTERS, *flags, "--save_total_limit", "1"]
    run_training_until(first / "checkpoint-4", tiny_inputs, first, *limited)
    shutil.move(first, moved)
    for path in moved.glob("checkpoint-6"):  # the run may have been faster than the kill
        shutil.rmtree(path)
    done = run_training(tiny_inputs, moved, *limited)
    assert "Resuming from checkpoint-4" in done.stdout
    assert list_checkpoints(moved) == ["checkpoint-2", "checkpoint-6"]
    assert sorted(read_evaluations(moved)) == [2, 4, 6]
    assert read_state(moved)["best_model_checkpoint"] == str(moved / "checkpoint-2")
    saved, best = load_weights(moved), load_weights(moved / "checkpoint-2")
    assert all(torch.equal(saved[name], best[name]) for name in saved)


@pytest.mark.multiprocess
def test_another_metric_chooses_the_best_checkpoint_anew(tiny_inputs, flags, tmp_path):
    output = tmp_path / "out"
    run_training(tiny_inputs, output, *TRAIN_ADAPTERS, *flags)
    for name in ("checkpoint-6", "adapter_model.safetensors", "trainer_state.json"):
        shutil.rmtree(output / name, ignore_errors=True)
    done = run_training(tiny_inputs, output, *TRAIN_ADAPTERS, *flags, "--greater_is_better", "False")
    assert "Best checkpoint: chosen anew" in done.stdout
    state = read_state(output)
    assert state["best_global_step"] == 6 and state["best_model_checkpoint"] == str(output / "checkpoint-6")


@pytest.mark.multiprocess
@pytest.mark.parametrize("zero", ZERO_FLAGS)
@pytest.mark.parametrize("trained", ["adapters", "all"])
def test_best_weights_are_loaded_under_zero(tiny_inputs, flags, tmp_path, zero, trained):
    output = tmp_path / "out"
    parts = {"adapters": TRAIN_ADAPTERS, "all": TRAIN_LLM_AND_PROJECTOR}[trained]
    run_training(tiny_inputs, output, *parts, *flags, *ZERO_FLAGS[zero], "--max_steps", "4", ranks=2)
    saved, best, last = (load_weights(folder) for folder in (output, output / "checkpoint-2", output / "checkpoint-4"))
    assert all(torch.equal(saved[name], best[name]) for name in saved)
    assert not all(torch.equal(saved[name], last[name]) for name in saved)


@pytest.mark.multiprocess
def test_damaged_best_checkpoint_is_refused(tiny_inputs, flags, tmp_path):
    output = tmp_path / "out"
    run_training_until(output / "checkpoint-4", tiny_inputs, output, *TRAIN_ADAPTERS, *flags)
    file = output / "checkpoint-2/language_model/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    done = run_training(tiny_inputs, output, *TRAIN_ADAPTERS, *flags, status=1)
    assert (
        "checkpoint-2 is damaged: language_model/adapter_model.safetensors: checksum mismatch"
        in done.stderr + done.stdout
    )


@pytest.mark.multiprocess
def test_save_strategy_best_saves_improvements_and_the_end(tiny_inputs, flags, tmp_path):
    output = tmp_path / "out"
    done = run_training(tiny_inputs, output, *TRAIN_ADAPTERS, *flags, "--save_strategy", "best")
    assert list_checkpoints(output) == ["checkpoint-2", "checkpoint-6"]
    assert "Saved the model of step 2 to" in done.stdout
    again = run_training(tiny_inputs, output, *TRAIN_ADAPTERS, *flags, "--save_strategy", "best")
    assert "Nothing to do: the model is in" in again.stdout


@pytest.mark.multiprocess
def test_improvement_between_two_saves_is_saved(tiny_inputs, flags, tmp_path):
    output = tmp_path / "out"
    run_training(tiny_inputs, output, *TRAIN_ADAPTERS, *flags, "--save_steps", "6")
    assert list_checkpoints(output) == ["checkpoint-2", "checkpoint-6"]
