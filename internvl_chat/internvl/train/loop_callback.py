"""Callback that connects transformers' hooks to InternVLTrainer."""

from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from internvl.train.trainer import InternVLTrainer


class LoopCallback(TrainerCallback):
    """Callback that calls the trainer's methods in a fixed order."""

    def __init__(self, trainer: "InternVLTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_run()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.begin_step()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step()

    def on_save(self, args, state, control, **kwargs):
        self.trainer.graceful_stop.end_save(state.global_step, control)

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.graceful_stop.end()
