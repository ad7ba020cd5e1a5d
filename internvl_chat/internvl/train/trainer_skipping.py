"""HF Trainer that leaves out steps whose loss or gradient went wrong, counts them, and gives up when they do not stop.

Between `stopping.py` and `scheduled.py`. A step is skipped on all ranks or on none, and no rank asks another: whatever
is not finite on one rank is made to spoil all its gradients, and with them the norm of the sum that every rank has.

A skipped step counts as a step: its samples are not seen again, and the learning rate moves on, so that every step has
the one that it has in a run without faults. Weights and moments stay as they are. (With fp16 the loss scale is found by
skipping: there transformers lets the learning rate wait.) A checkpoint that is due at it waits for one that is not
skipped: it may be the weights that are wrong, and the checkpoint that --save_total_limit would remove is from before.
"""

import logging
import math

import torch
from torch import nn

from internvl.dist_utils import gather_objects
from internvl.train.trainer_stopping import StoppingTrainer

logger = logging.getLogger(__name__)


class SkippingTrainer(StoppingTrainer):
    """Trains on the steps that can be trained on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.skipped_steps = 0  # by this process
        self.skipped_in_a_row = 0
        self.looked_at = 0  # the last step that was looked at
        self.save_is_due = False  # since a step that was skipped
        self.skipping = ""  # why the step that just was is skipped
        self.exploded: float | None = None  # its gradient's norm under DeepSpeed, where that is why

    # -- step --------------------------------------------------------------------------------------------------------

    @staticmethod
    def propagate_nonfinite_loss(loss: torch.Tensor) -> torch.Tensor:
        """A loss that gives no finite gradient unless it is finite itself: that of `inf` may well be 0."""
        return loss * torch.where(loss.isfinite(), 1.0, torch.nan)

    def exceeds(self, norm: float) -> bool:
        bound = self.args.skip_above_grad_norm
        return bound is not None and norm > bound

    def before_zero_step(self, optimizer) -> None:
        """Make DeepSpeed's optimizer, which skips what is not finite, skip also what exceeds the bound."""
        self.exploded = None
        if self.args.skip_above_grad_norm is not None and self.exceeds(norm := norm_before_step(optimizer)):
            self.exploded = norm
            set_grads_to_inf(optimizer)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None) -> float:
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.item() if isinstance(norm, torch.Tensor) else norm
        if self.exploded is not None:
            norm = self.exploded
        if norm is not None and self.exceeds(norm) and math.isfinite(norm):
            self.skipping = f"the norm of the gradient is {norm:.4g}, above --skip_above_grad_norm"
        elif norm is not None and not 0 <= norm < math.inf:
            self.skipping = "the loss or its gradient is not finite"
        if self.skipping and not self.is_deepspeed_enabled:
            model.zero_grad(set_to_none=True)  # torch's optimizers leave alone what has no gradient
        return norm

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """At the end of each step, and of each epoch, which is no step."""
        if self.skipping:
            self.note_skipped()
            if not self.control.should_training_stop:
                self.save_is_due |= self.control.should_save
                self.control.should_save = False
        elif self.state.global_step > self.looked_at:
            self.skipped_in_a_row = 0
            self.control.should_save |= self.save_is_due
            self.save_is_due = False
        self.looked_at, self.skipping = self.state.global_step, ""
        total = self._total_loss_scalar
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if not math.isfinite(self._total_loss_scalar):  # that report says so; later ones, and the run's, begin anew
            self._total_loss_scalar = total
            self._tr_loss.zero_()

    def note_skipped(self) -> None:
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        logger.warning("step %d is skipped: %s", self.state.global_step, self.skipping)
        if self.skipped_in_a_row > self.args.max_skipped_steps:
            raise ValueError(
                f"{self.skipped_in_a_row} steps in a row were skipped, step {self.state.global_step} because "
                f"{self.skipping}; --max_skipped_steps allows {self.args.max_skipped_steps}. They changed no weight; "
                f"{self.where}. A lower --learning_rate often helps."
            )
        if self.is_deepspeed_enabled and not self.args.fp16:  # without DeepSpeed it moved on, where it is not to wait
            self.lr_scheduler.step()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add how many steps were skipped, once there is one."""
        if "loss" in logs and self.skipped_steps:
            logs["skipped_steps"] = self.skipped_steps
        super().log(logs, start_time)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Raises a ValueError, on every rank, rather than write weights that are not finite."""
        wrong = [name for name, parameter in self.trained_parameters().items() if not _is_finite(parameter)]
        if found := sorted({name for names in gather_objects(wrong) for name in names}):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ValueError(
                f"the weights are not finite after step {self.state.global_step} ({found[0]}{more}): none are written. "
                "A lower --learning_rate often helps."
            )
        super().save_model(output_dir, _internal_call)


def _is_finite(parameter: nn.Parameter) -> bool:
    """Of this rank's share, under ZeRO-3."""
    return bool(torch.isfinite(getattr(parameter, "ds_tensor", parameter)).all())


def norm_before_step(optimizer) -> float:
    """Norm of the gradient that a ZeRO optimizer is about to step with, the same on every rank; a collective."""
    from deepspeed.runtime.utils import combine_grad_norm_groups

    if hasattr(optimizer, "scaled_global_norm"):  # ZeRO-1 and 2
        norm = optimizer.scaled_global_norm()
    else:
        norm = combine_grad_norm_groups(optimizer._get_norm_groups())
    return float(norm) / optimizer.loss_scale


def set_grads_to_inf(optimizer) -> None:
    """Make the gradients of a ZeRO optimizer infinite, where they are: on the device, or as norms when offloaded."""
    for gradients in optimizer.averaged_gradients.values():
        for gradient in gradients or ():
            gradient.fill_(torch.inf)
    norms = getattr(optimizer, "norm_for_param_grads", {})
    norms.update({parameter: torch.full_like(norm, torch.inf) for parameter, norm in norms.items()})
