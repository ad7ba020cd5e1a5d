"""Skip optimizer steps with a non-finite loss or gradient.

A step is skipped on all ranks or on none, without communication: a non-finite value on one rank makes all of its
gradients non-finite, and with them the norm of the summed gradient, which every rank computes.

A skipped step counts as a step. Its samples are not repeated, and the learning rate schedule advances, so every step
has the same learning rate as in a run without skipped steps. Weights and moments do not change. In fp16 skipped steps
also adjust the loss scale, and transformers does not advance the schedule then.

A checkpoint that is due at a skipped step is postponed to the next step that is not skipped. The weights may be the
reason, and --save_total_limit could remove the last checkpoint with good weights.
"""

import logging
import math
from collections.abc import Mapping

import torch
from torch import nn
from transformers import TrainerControl

from internvl.dist_utils import gather_objects

logger = logging.getLogger(__name__)


class NonFiniteStepGuard:
    """Guard that skips steps and fails after too many in a row.

    Args:
        max_grad_norm: `--skip_above_grad_norm`; None for no limit.
        max_skipped_steps: `--max_skipped_steps`.

    Attributes:
        skip_reason: why the current step is skipped; empty if it is not.
    """

    def __init__(self, max_grad_norm: float | None, max_skipped_steps: int):
        self.max_grad_norm, self.max_skipped_steps = max_grad_norm, max_skipped_steps
        self.num_skipped = 0  # since this process started
        self.num_skipped_in_a_row = 0
        self.skip_reason = ""
        self.is_save_due = False  # a checkpoint was postponed because its step was skipped
        self._norm_above_bound: float | None = None  # gradient norm of DeepSpeed's next step, if it is too large
        self._nonfinite_loss: torch.Tensor | float = 0.0  # sum of the non-finite losses since the last report

    # -- losses --------------------------------------------------------------------------------------------------------

    @staticmethod
    def propagate_nonfinite_loss(loss: torch.Tensor) -> torch.Tensor:
        """Make the gradient of a non-finite loss non-finite.

        The gradient of `inf` can be 0.
        """
        return loss * torch.where(loss.isfinite(), 1.0, torch.nan)

    def keep_finite(self, loss: torch.Tensor) -> torch.Tensor:
        """Replace a non-finite loss by 0, for the run's mean loss.

        This does not synchronize with the device; `take_nonfinite_loss` does.
        """
        finite_loss = torch.where(loss.isfinite(), loss, 0.0)
        self._nonfinite_loss = self._nonfinite_loss + (loss - finite_loss)  # NaN or infinite where it was, else 0
        return finite_loss

    def take_nonfinite_loss(self) -> float:
        """Return the sum of non-finite losses since the last call, else 0.0."""
        value, self._nonfinite_loss = float(self._nonfinite_loss), 0.0
        return value

    # -- gradients -----------------------------------------------------------------------------------------------------

    def exceeds_bound(self, norm: float) -> bool:
        return self.max_grad_norm is not None and norm > self.max_grad_norm

    def check_zero_grad_norm(self, norm: float) -> bool:
        """Check whether ZeRO's next step must be skipped for its gradient norm."""
        self._norm_above_bound = norm if self.exceeds_bound(norm) else None
        return self._norm_above_bound is not None

    def check_grad_norm(self, norm: float | None) -> float | None:
        """Set `skip_reason` according to the norm of the summed gradient.

        Returns:
            The norm for the log.
        """
        if self._norm_above_bound is not None:  # DeepSpeed reports the norm of the replaced gradients
            norm, self._norm_above_bound = self._norm_above_bound, None
        if norm is not None and math.isfinite(norm) and self.exceeds_bound(norm):
            self.skip_reason = f"gradient norm {norm:.4g} is above --skip_above_grad_norm {self.max_grad_norm:g}"
        elif norm is not None and not 0 <= norm < math.inf:  # DeepSpeed reports -1 for an overflow
            self.skip_reason = "non-finite loss or gradient"
        return norm

    # -- end of a step -------------------------------------------------------------------------------------------------

    def end_step(self, step: int, control: TrainerControl, resume_hint: str) -> bool:
        """Count the step and postpone a checkpoint due at a skipped one.

        Returns:
            Whether the step was skipped.

        Raises:
            ValueError: more than `max_skipped_steps` steps in a row were skipped.
        """
        reason, self.skip_reason = self.skip_reason, ""
        if not reason:
            self.num_skipped_in_a_row = 0
            control.should_save |= self.is_save_due
            self.is_save_due = False
            return False
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        logger.warning("Skipped step %d: %s", step, reason)
        if self.num_skipped_in_a_row > self.max_skipped_steps:
            raise ValueError(
                f"{self.num_skipped_in_a_row} steps in a row were skipped, step {step} because of: {reason}. "
                f"--max_skipped_steps allows {self.max_skipped_steps}. They changed no weight; {resume_hint}. "
                "A lower --learning_rate often helps."
            )
        if not control.should_training_stop:
            self.is_save_due |= control.should_save
            control.should_save = False
        return True


def check_weights_finite(parameters: Mapping[str, nn.Parameter], step: int) -> None:
    """Raise an error on every rank for non-finite weights. A collective.

    Raises:
        ValueError: a weight of any rank is not finite.
    """
    # Under ZeRO-3 each rank checks its own partition.
    nonfinite = [name for name, p in parameters.items() if not torch.isfinite(getattr(p, "ds_tensor", p)).all()]
    if names := sorted({name for names in gather_objects(nonfinite) for name in names}):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"Non-finite weights after step {step} ({names[0]}{more}): nothing is saved. A lower --learning_rate often "
            "helps."
        )
