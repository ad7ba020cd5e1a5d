"""What happens between the steps of InternVLTrainer, in a fixed order."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from internvl.arguments.schedulers import NEED_METRIC
from internvl.metrics.device_peak import get_device_peak
from internvl.train.best_model import restore_best_model
from internvl.train.deepspeed_engine import HookedDeepSpeedEngine
from internvl.train.run_evaluation import add_base_answers
from internvl.train.run_reports import find_evaluation
from internvl.train.training_states import write_trial_checkpoint

if TYPE_CHECKING:
    from internvl.train.trainer import InternVLTrainer

logger = logging.getLogger(__name__)


class LoopCallback(TrainerCallback):
    """Callback that calls the collaborating objects of a trainer.

    For transformers a run is a single epoch, see `InternVLTrainer`.
    """

    def __init__(self, trainer: "InternVLTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Prepare the first step, after everything is on its device."""
        trainer = self.trainer
        num_epoch_steps = max(1, trainer.schedule.count_epoch_steps(trainer.epoch))
        state.num_train_epochs = max(1, -(-state.max_steps // num_epoch_steps))
        state.compute_steps(args, state.max_steps)  # the state of a checkpoint has --save_steps of its run
        trainer.checkpoints.last_saved_step = state.global_step  # above 0 only after resuming
        if trainer.is_deepspeed_enabled:
            wrapped: Any = trainer.accelerator.deepspeed_engine_wrapped
            engine = HookedDeepSpeedEngine(wrapped.engine, trainer.before_zero_step)
            trainer.accelerator.deepspeed_engine_wrapped = engine
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        trainer.metrics.peak_flops, description = get_device_peak(args.device, dtype)
        logger.info("MFU reference peak: %s", description)
        if state.global_step == 0 and not args.no_smoke_save:
            write_trial_checkpoint(trainer)
        trainer.reports.begin(state.global_step)
        if state.global_step:
            restore_best_model(trainer)
        add_base_answers(trainer)
        for folder in self.list_output_dirs() if args.should_save else []:
            folder.mkdir(parents=True, exist_ok=True)
        trainer.graceful_stop.begin(args.ddp_timeout_delta)
        trainer.watchdog.start(state.global_step + 1)

    def on_step_begin(self, args, state, control, **kwargs):
        """Advance the epoch if all of its steps are done."""
        trainer = self.trainer
        if trainer.step_in_epoch == trainer.schedule.count_epoch_steps(trainer.epoch):
            trainer.epoch, trainer.steps_before_epoch = trainer.epoch + 1, state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        """Update counters and decide on logging, evaluating, saving and stopping."""
        trainer = self.trainer
        trainer.metrics.num_steps += 1
        trainer.metrics.timer.mark("other")
        trainer.watchdog.begin_next_step()
        num_epoch_steps = trainer.schedule.count_epoch_steps(trainer.epoch)
        state.epoch = trainer.epoch + trainer.step_in_epoch / num_epoch_steps
        if trainer.step_in_epoch == num_epoch_steps:
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
        if state.global_step >= state.max_steps:
            control.should_evaluate |= args.do_eval
            control.should_save |= args.save_strategy == SaveStrategy.BEST
        is_skipped = trainer.guard.end_step(state.global_step, control, trainer.checkpoints.resume_hint)
        is_scheduled = args.lr_scheduler_type not in NEED_METRIC
        if is_skipped and is_scheduled and trainer.is_deepspeed_enabled and not args.fp16:
            trainer.lr_scheduler.step()  # transformers does so unless DeepSpeed has skipped the step
        is_missing = state.global_step < state.max_steps and not trainer.next_batches.read_ahead()
        trainer.graceful_stop.end_step(state.global_step, control, self.list_output_dirs(), is_missing)
        control.should_log |= trainer.graceful_stop.has_stopped and args.logging_strategy != IntervalStrategy.NO

    def on_epoch_end(self, args, state, control, **kwargs):
        """Evaluate a run that resumes after its last step, if that was not evaluated.

        This is the end of the run. `on_step_end` has decided on everything else.
        """
        is_evaluated = find_evaluation(state, state.global_step) is not None
        control.should_evaluate = args.do_eval and not (self.trainer.num_trained_steps or is_evaluated)

    def on_save(self, args, state, control, **kwargs):
        self.trainer.graceful_stop.end_save(state.global_step, control)

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.graceful_stop.end()

    def list_output_dirs(self) -> list[Path]:
        """List the folders that the run writes to: output and TensorBoard."""
        callbacks = self.trainer.callback_handler.callbacks
        writers = filter(None, (getattr(callback, "tb_writer", None) for callback in callbacks))
        return [self.trainer.checkpoints.output_dir, *(Path(writer.get_logdir()) for writer in writers)]
