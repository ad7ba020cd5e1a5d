"""A hook between backward pass and optimizer step under DeepSpeed."""

from collections.abc import Callable

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper  # not from `utils`, which has it with DeepSpeed only
from torch import nn


class HookedDeepSpeedEngine(DeepSpeedEngineWrapper):
    """Engine that calls `before_step_fn(optimizer)` before each optimizer step.

    accelerate 1.15 calls only `backward`, which also takes the optimizer step.
    """

    def __init__(self, engine: nn.Module, before_step_fn: Callable):
        super().__init__(engine)
        self.before_step_fn = before_step_fn

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self.before_step_fn(self.engine.optimizer)
            self.engine.step()
