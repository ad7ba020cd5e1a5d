"""The step guard alone: skipped steps, counters, delayed checkpoints."""

import math

import pytest
import torch
from transformers import TrainerControl

from internvl.train.step_guard import NonFiniteStepGuard

RESUME_HINT = "the same command resumes from checkpoint-4"


def end_step(
    guard: NonFiniteStepGuard, step: int, norm: float | None = 1.0, **control_flags
) -> tuple[bool, TrainerControl]:
    """End a step; return whether it is skipped, and the loop's control."""
    control = TrainerControl(**control_flags)
    guard.check_grad_norm(norm)
    return guard.end_step(step, control, RESUME_HINT), control


@pytest.mark.parametrize("loss", [1.0, math.inf, -math.inf, math.nan])
def test_nonfinite_loss_has_a_nonfinite_gradient(loss):
    value = torch.tensor(2.0, requires_grad=True)
    scaled = NonFiniteStepGuard.propagate_nonfinite_loss(0 * value + loss)
    (gradient,) = torch.autograd.grad(scaled, value)
    assert math.isfinite(gradient) == math.isfinite(loss)


def test_nonfinite_losses_are_reported_once_and_kept_out_of_the_mean():
    guard = NonFiniteStepGuard(None, 3)
    losses = [guard.keep_finite(torch.tensor(loss)).item() for loss in (1.5, math.nan, 2.5)]
    assert losses == [1.5, 0.0, 2.5]
    assert math.isnan(guard.take_nonfinite_loss()) and guard.take_nonfinite_loss() == 0.0
    guard.keep_finite(torch.tensor(math.inf))
    assert guard.take_nonfinite_loss() == math.inf


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (2.0, ""),
        (None, ""),
        (2.1, "gradient norm 2.1 is above --skip_above_grad_norm 2"),
        (math.inf, "non-finite loss or gradient"),
        (math.nan, "non-finite loss or gradient"),
        (-1.0, "non-finite loss or gradient"),
    ],
)
def test_step_is_skipped_with_a_reason(norm, reason):
    guard = NonFiniteStepGuard(2.0, 3)
    guard.check_grad_norm(norm)
    assert guard.skip_reason == reason


def test_norm_above_the_bound_is_reported_instead_of_deepspeeds():
    guard = NonFiniteStepGuard(2.0, 3)
    # DeepSpeed reports -1 for a step that it skips.
    assert not guard.check_zero_grad_norm(1.0) and guard.check_grad_norm(1.0) == 1.0
    assert guard.check_zero_grad_norm(5.0) and guard.check_grad_norm(-1.0) == 5.0
    assert guard.skip_reason == "gradient norm 5 is above --skip_above_grad_norm 2"
    assert guard.check_grad_norm(1.0) == 1.0, "the norm is reported for that step only"


def test_checkpoint_due_at_a_skipped_step_is_saved_after_the_next_good_step():
    guard = NonFiniteStepGuard(None, 3)
    is_skipped, control = end_step(guard, 1, math.nan, should_save=True)
    assert is_skipped and not control.should_save
    is_skipped, control = end_step(guard, 2, math.nan)
    assert is_skipped and not control.should_save
    is_skipped, control = end_step(guard, 3)
    assert not is_skipped and control.should_save
    assert not end_step(guard, 4)[1].should_save
    assert guard.num_skipped == 2 and guard.num_skipped_in_a_row == 0
    _, control = end_step(guard, 5, math.nan, should_save=True, should_training_stop=True)
    assert control.should_save, "the last step is always saved"


def test_too_many_skipped_steps_in_a_row_end_the_run():
    guard = NonFiniteStepGuard(None, 2)
    for step in (1, 2):
        end_step(guard, step, math.nan)
    end_step(guard, 3)
    for step in (4, 5):
        end_step(guard, step, math.nan)
    message = f"3 steps in a row were skipped, step 6 .*--max_skipped_steps allows 2.*{RESUME_HINT}"
    with pytest.raises(ValueError, match=message):
        end_step(guard, 6, math.nan)
