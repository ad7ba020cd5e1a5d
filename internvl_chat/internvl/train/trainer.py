"""The training loop: transformers' Trainer on the batches of an epoch plan.

The loop itself, DeepSpeed, learning rate schedules and reporting are those of transformers. Everything else is done by
objects that are tested separately:

    batches       PlanBatchSampler    planning/batch_sampler.py, over the DataSchedule
    loss weights  MicroBatchWeights   train/loss_weights.py
    checkpoints   CheckpointManager   checkpoint/manager.py
    flags         RunRecord           checkpoint/resume_rules.py
    skipped steps NonFiniteStepGuard  train/step_guard.py
    preemption    GracefulStop        train/graceful_stop.py
    metrics       StepMetrics         metrics/step_metrics.py
    reports       RunReports          train/run_reports.py
    evaluation    RunEvaluation       train/run_evaluation.py
    best model    BestModelRecord     train/best_model.py
    stalled steps Watchdog            runtime/watchdog.py
    console       ConsoleCallback     train/console.py

For transformers a run is a single epoch. So epochs may have different numbers of steps, and a run resumes at a position
of the plan. `LoopCallback` (train/loop_callback.py) calls the objects between steps, in a fixed order.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import SaveStrategy

from internvl.arguments.training import TrainingArguments
from internvl.checkpoint.deepspeed_internals import compute_grad_norm, set_grads_to_inf
from internvl.checkpoint.manager import CheckpointManager
from internvl.checkpoint.optimizer_state import LATEST_FILE, OPTIMIZER_STATE_FILE
from internvl.checkpoint.resume_rules import RunRecord, check_model
from internvl.checkpoint.safe_load import refuse_unsafe_pickles, weights_only_loading
from internvl.checkpoint.saved_states import one_line_state_errors
from internvl.checkpoint.trainer_state import read_global_step
from internvl.data.collators import move_batch
from internvl.data.skipped_samples import SkippedSampleReport
from internvl.dist_utils import run_on_rank_0, set_collective_timeout
from internvl.evaluation.evaluation_data import EvaluationData
from internvl.evaluation.evaluator import evaluate
from internvl.evaluation.settings import EvaluationSettings
from internvl.metrics.model_flops import ModelFlops, count_model_flops
from internvl.metrics.step_metrics import StepMetrics
from internvl.model.auxiliary_files import AuxiliaryFiles
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.lora import is_peft_model
from internvl.planning.batch_sampler import PlanBatchSampler, compute_max_batch_bytes, count_run_steps
from internvl.planning.data_schedule import DataSchedule
from internvl.planning.data_state import resume_data, save_data_state
from internvl.runtime.watchdog import Watchdog
from internvl.train.best_model import (
    BestModelRecord,
    publish_best_checkpoint,
    read_best_model,
    update_best_checkpoint,
)
from internvl.train.build_dataloader import build_dataloader
from internvl.train.console import ConsoleCallback
from internvl.train.graceful_stop import GracefulStop, StoppedBySignalError
from internvl.train.gradient_check import watch_gradients
from internvl.train.loop_callback import LoopCallback
from internvl.train.loss_weights import MicroBatchWeights
from internvl.train.next_batches import NextBatches
from internvl.train.param_groups import build_param_groups
from internvl.train.reporter_names import use_common_names
from internvl.train.run_evaluation import RunEvaluation, evaluate_run
from internvl.train.run_reports import RunReports
from internvl.train.step_guard import NonFiniteStepGuard
from internvl.train.training_states import (
    find_random_states,
    load_best_weights,
    load_training_states,
    load_weights,
    save_engine_states,
    save_weights,
)

logger = logging.getLogger(__name__)


class InternVLTrainer(Trainer):
    """Trainer of a chat model on the rows of a data schedule.

    Overrides these private methods of transformers (5.22 to 5.24; a test fails with the name of one that has moved):
    `_prepare_inputs`, `_prepare_for_training`, `_get_grad_norm`, `_evaluate`, `_determine_best_metric`,
    `_load_best_model`, `_save_checkpoint`, `_get_output_dir`, `_save_optimizer_and_scheduler`, `_load_from_checkpoint`,
    `_load_rng_state`.

    Args (beyond those of transformers.Trainer):
        schedule: the epoch plans.
        skipped_samples: report of the samples that are unusable.
        preprocessor: content of `preprocessor_config.json`.
        auxiliary_files: to write into checkpoints.
        run_record: the flags of the run.
        accept_changed_data: resume even if the data has changed.
        all_gather_loss: see `MicroBatchWeights`.
        evaluation: None without evaluation sets.
    """

    args: TrainingArguments
    model: InternVLChatModel
    # transformers declares types that do not hold during a run.
    model_wrapped: Any
    train_dataset: Any
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any

    def __init__(
        self,
        *args,
        schedule: DataSchedule,
        skipped_samples: SkippedSampleReport,
        preprocessor: dict,
        auxiliary_files: AuxiliaryFiles,
        run_record: RunRecord,
        accept_changed_data: bool = False,
        all_gather_loss: bool = False,
        evaluation: RunEvaluation | None = None,
        **kwargs,
    ):
        # transformers checks only that there is an evaluation set; `evaluate` is overridden.
        super().__init__(*args, eval_dataset=evaluation, **kwargs)  # pyrefly: ignore[bad-argument-type]
        args = self.args
        args.ignore_data_skip = True  # the batch sampler starts at the position to resume from
        self.schedule, self.skipped_samples, self.preprocessor = schedule, skipped_samples, preprocessor
        self.evaluation, self.best_model = evaluation, BestModelRecord()
        self.loaded_best_step: int | None = None  # with --load_best_model_at_end
        self.run_record, self.auxiliary_files = run_record, auxiliary_files
        self.accept_changed_data = accept_changed_data
        self.loss_weights = MicroBatchWeights(schedule, self.model.loss_reduction, all_gather_loss)
        self.epoch, self.steps_before_epoch = 0, 0  # the latter is the global step at which `epoch` began
        self.first_step = 0  # global step at which this process began
        self.needs_base_model = False  # although checkpoints may hold all weights
        self.check_gradients: Callable | None = None  # checks those of the first step

        adapted = any(is_peft_model(module) for module in self.model.children())
        self.saves_adapters_only = adapted and self.model.base_checkpoint is not None and not args.save_full_model
        output_dir = Path(str(args.output_dir))
        self.checkpoints = CheckpointManager(
            output_dir, args.should_save, args.save_total_limit, one_dir_per_node=args.save_on_each_node
        )
        self.guard = NonFiniteStepGuard(args.skip_above_grad_norm, args.max_skipped_steps)
        self.graceful_stop = GracefulStop(self.checkpoints, args.save_on_signal_seconds, args.watchdog_seconds)
        self.metrics = StepMetrics(args.device)
        self.next_batches = NextBatches(self.metrics.timer)
        self.reports = RunReports(self.metrics, self.guard, skipped_samples, output_dir, args.process_index == 0)
        self.watchdog = Watchdog(args.watchdog_factor, args.watchdog_seconds, args.process_index)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        use_common_names(self)
        self.add_callback(ConsoleCallback(self))
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
        self.add_callback(LoopCallback(self))

    # -- data ----------------------------------------------------------------------------------------------------------

    @property
    def step_in_epoch(self) -> int:
        """Steps of the current epoch that are done."""
        return self.state.global_step - self.steps_before_epoch

    def count_steps(self) -> int:
        """Count the steps of the run, including those before a resumed checkpoint."""
        args, patience = self.args, self.args.early_stopping_patience
        if patience is not None and self.best_model.num_without_improvement >= patience:
            return self.state.global_step  # the run has stopped early
        steps_before = self.steps_before_epoch
        return count_run_steps(self.schedule, self.epoch, steps_before, args.num_train_epochs, args.max_steps)

    def get_train_dataloader(self) -> DataLoader:
        """Build the DataLoader from the current position to the run's end.

        Each rank reads its own column of the plan, so accelerate must not split the batches.
        """
        num_steps = self.count_steps() - self.state.global_step
        sampler = PlanBatchSampler(self.schedule, self.args.process_index, self.epoch, self.step_in_epoch, num_steps)
        plan, lengths = self.schedule.plan(self.epoch), self.schedule.lengths
        max_bytes = compute_max_batch_bytes(plan, lengths, self.preprocessor["size"])
        return build_dataloader(self.train_dataset, sampler, self.data_collator, self.args, max_bytes)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        read_fn = partial(super().get_batch_samples, epoch_iterator, num_batches, device)
        batches, num_items = self.next_batches.take(read_fn)
        self.loss_weights.begin_step(batches, device, partial(self.accelerator.reduce, reduction="mean"))
        return batches, num_items

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Count a batch, move it to the device, normalize its tiles."""
        self.reports.new_unusable_samples += inputs.pop("bad_samples", [])
        self.metrics.count_batch(inputs, inputs.pop("documents", []), self.flops)
        # transformers' method waits for each copy.
        return move_batch(inputs, self.args.device, self.preprocessor["image_mean"], self.preprocessor["image_std"])

    # -- step ----------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Create the optimizer with one parameter group per part and learning rate.

        If states are offloaded, accelerate replaces it by DeepSpeed's optimizer, which is AdamW only if this is torch's
        AdamW.
        """
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(build_param_groups(self.model, self.args), **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> Any:
        """Create the scheduler of learning rates.

        Some schedulers read `defaults`, which only torch's optimizer within those of accelerate and DeepSpeed has.
        """
        optimizer = optimizer or self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = self.weigh_loss(loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def weigh_loss(self, loss: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Multiply a loss by the weight of its micro-batch in the step."""
        self.metrics.timer.mark("backward")
        weight = self.loss_weights.compute(inputs, self.epoch, self.step_in_epoch)
        return self.guard.propagate_nonfinite_loss(loss) * weight

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """Run forward and backward pass of a micro-batch.

        Returns:
            Its loss, or 0 for a non-finite loss.
        """
        if self.check_gradients is None:
            self.check_gradients = watch_gradients(self.model.named_parameters())
        self.metrics.timer.mark("forward")
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.metrics.timer.mark("optimizer")
            self.check_gradients(finite=self.state.global_step == 0)
            self.check_gradients = lambda finite: None
        return self.guard.keep_finite(loss)

    def before_zero_step(self, optimizer) -> None:
        """Make DeepSpeed skip a step whose finite gradient norm is too large."""
        self.metrics.timer.mark("optimizer")
        if self.guard.max_grad_norm is not None and self.guard.check_zero_grad_norm(compute_grad_norm(optimizer)):
            set_grads_to_inf(optimizer)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None) -> float | None:
        norm = super()._get_grad_norm(model, grad_norm)
        norm = self.guard.check_grad_norm(norm.item() if isinstance(norm, torch.Tensor) else norm)
        if self.guard.skip_reason and not self.is_deepspeed_enabled:
            model.zero_grad(set_to_none=True)  # torch's optimizers skip parameters without a gradient
        return norm

    # -- reports -------------------------------------------------------------------------------------------------------

    @cached_property
    def flops(self) -> ModelFlops:
        """FLOPs of the model per token, tile and token pair."""
        return self.count_flops()

    def count_flops(self) -> ModelFlops:
        """Count the FLOPs of a training step; overridden for a reference model."""
        return count_model_flops(self.model)

    def floating_point_ops(self, inputs: dict) -> float:
        """Return the FLOPs of the last batch, for transformers' `total_flos`."""
        return self.metrics.flops_of_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of all ranks to the log; append to `metrics.jsonl`.

        A collective.
        """
        self.reports.report_unusable_samples()
        if "train_loss" in logs and not self.num_trained_steps:
            return  # there is no loss
        if "loss" in logs:
            self.reports.add_step_metrics(logs)
        super().log(logs, start_time)
        self.reports.append(self.state.global_step, logs)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Evaluate the model on the evaluation sets of the run; log the metrics. A collective.

        Returns:
            Metrics with the prefix `eval_`, as in the logs of transformers.

        Raises:
            StoppedBySignalError: a preemption signal ended the evaluation.
        """
        metrics = evaluate_run(self)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_autocast(self) -> AbstractContextManager:
        """Return the context of the precision that training has."""
        args, has_engine = self.args, self.model_wrapped is not self.model
        if self.is_deepspeed_enabled and (args.lora_fp32 or not has_engine):  # else the engine has cast the weights
            dtype = torch.float16 if args.fp16 else torch.bfloat16
            return torch.autocast(args.device.type, dtype, enabled=args.lora_fp32 or args.bf16 or args.fp16)
        return self.accelerator.autocast()

    def measure(self, data: EvaluationData, settings: EvaluationSettings, folder: Path) -> dict[str, float]:
        """Measure the model on evaluation sets. A collective."""
        name = self.args.run_name or self.args.output_dir
        return evaluate(self.model, self.processing_class, data, settings, folder, self.state.global_step, name)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.state.global_step:  # --eval_on_start of a run that resumes
            return {}
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except StoppedBySignalError:
            if not skip_scheduler:  # else the first step follows, and its end handles the signal
                self.graceful_stop.stop_between_steps(self.state.global_step, self.control)
            return {}
        if self.control.should_training_stop:  # early stopping: the next start must find that nothing is left to do
            self.control.should_save |= self.args.save_strategy != SaveStrategy.NO
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Check whether this model is the best; with --save_strategy best, whether to save it."""
        must_save = self.control.should_save
        name = self.args.metric_for_best_model
        is_best = name in metrics and super()._determine_best_metric(metrics, trial)
        if metrics and name and name not in metrics:  # no answer of its set could be scored
            logger.warning("Best checkpoint: the evaluation of step %d has no %s", self.state.global_step, name)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        if not is_best and self.state.best_global_step is None:
            self.state.best_metric = None  # transformers sets an infinity, which JSON lacks
        return is_best or must_save

    def _load_best_model(self) -> None:
        if not self.graceful_stop.has_stopped:
            load_best_weights(self, Path(str(self.state.best_model_checkpoint)))
            self.loaded_best_step = self.state.best_global_step

    # -- writing checkpoints -------------------------------------------------------------------------------------------

    def get_trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save adapter checkpoint or full model. A collective.

        Raises:
            ValueError: on every rank, if a weight is not finite.
        """
        folder = Path(output_dir) if output_dir else self.checkpoints.output_dir
        save_weights(self, folder, partial(super().save_model, str(folder), _internal_call))

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        step = self.state.global_step
        if self.checkpoints.last_saved_step == step:
            update_best_checkpoint(self)
            return
        self.reports.report_unusable_samples()  # a resumed run does not read them again
        with self.watchdog.during("saving"), self.checkpoints.writing(step):
            super()._save_checkpoint(model, trial)
            publish_best_checkpoint(self)

    def _get_output_dir(self, trial) -> str:
        """Return where transformers writes and rotates checkpoints; the manager publishes and rotates them."""
        return str(self.checkpoints.unfinished_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        if self.is_deepspeed_enabled and self.saves_adapters_only:
            save_engine_states(self, folder)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_data_state(self.schedule, self.epoch, self.step_in_epoch, folder, self.checkpoints.output_dir)

    # -- resuming ------------------------------------------------------------------------------------------------------

    @property
    def num_trained_steps(self) -> int:
        """Steps that this process has trained."""
        return self.state.global_step - self.first_step

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Train to the end of the run, from a checkpoint if given.

        Checkpoints are untrusted: no code in them is run. A checkpoint at the end of the run or beyond is loaded, so
        that it can be saved as the final model, and no step is trained.
        """
        if resume_from_checkpoint and not self.first_step:
            self.resume_position(Path(resume_from_checkpoint))
        # transformers cannot count the steps of a sampler without `__len__`.
        self.args.max_steps = self.count_steps()
        try:
            with weights_only_loading(deepspeed=self.is_deepspeed_enabled):
                return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self.next_batches.close()
            self.watchdog.stop()

    def resume_position(self, checkpoint: Path) -> None:
        """Check that a checkpoint fits this run, and set the position in the data. A collective."""
        run_on_rank_0(lambda: refuse_unsafe_pickles(checkpoint))
        check_model(checkpoint, self.model, self.needs_base_model)
        self.first_step = self.state.global_step = run_on_rank_0(lambda: read_global_step(checkpoint))
        self.best_model = run_on_rank_0(lambda: read_best_model(checkpoint, self.args))
        self.epoch, step = resume_data(self.schedule, checkpoint, self.accept_changed_data, self.first_step)
        self.steps_before_epoch = self.first_step - step
        logger.info("Resuming from %s (epoch %d, step %d)", checkpoint.name, self.epoch, step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if any(Path(resume_from_checkpoint, name).exists() for name in (OPTIMIZER_STATE_FILE, LATEST_FILE)):
            raise ValueError(f"{resume_from_checkpoint} was written under DeepSpeed: resume with --deepspeed.")
        load_weights(self, Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint:
            with one_line_state_errors(find_random_states(Path(checkpoint), self.args)):
                super()._load_rng_state(checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None):
        """Prepare model and optimizer; load the states of a checkpoint.

        transformers' own loading would also load the hyperparameters.
        """
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        set_collective_timeout(self.args.ddp_timeout_delta)
        if resume_from_checkpoint:
            load_training_states(self, Path(resume_from_checkpoint))
        return prepared
