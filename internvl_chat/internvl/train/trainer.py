"""The training loop: transformers' Trainer on the batches of an epoch plan.

The loop itself, DeepSpeed, learning rate schedules and reporting are those of transformers. Everything else is done by
objects that are tested separately:

    batches       PlanBatchSampler    planning/batch_sampler.py, over the DataSchedule
    checkpoints   CheckpointManager   checkpoint/manager.py
    skipped steps NonFiniteStepGuard  train/step_guard.py
    preemption    GracefulStop        train/graceful_stop.py
    metrics       StepMetrics         metrics/step_metrics.py
    stalled steps Watchdog            runtime/watchdog.py
    console       ConsoleCallback     train/console.py

For transformers a run is a single epoch. So epochs may have different numbers of steps, and a run resumes at a position
of the plan. `LoopCallback` (train/loop_callback.py) connects transformers' hooks to `begin_run`, `begin_step` and
`end_step`, which call the objects in a fixed order.
"""

import json
import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from internvl.arguments.training import TrainingArguments
from internvl.checkpoint.deepspeed_internals import compute_grad_norm, set_grads_to_inf
from internvl.checkpoint.manager import CheckpointManager
from internvl.checkpoint.optimizer_state import OPTIMIZER_STATE_FILE, load_engine_states, save_optimizer_states
from internvl.checkpoint.safe_load import refuse_unsafe_pickles, weights_only_loading
from internvl.data.images import normalize_tiles
from internvl.dist_utils import count_cores_per_rank, gather_objects, run_on_rank_0, set_collective_timeout
from internvl.metrics.device_peak import get_device_peak
from internvl.metrics.model_flops import ModelFlops, count_model_flops
from internvl.metrics.step_metrics import (
    METRICS_FILE,
    StepMetrics,
    append_metrics,
    combine_rank_reports,
    drop_metrics_after,
)
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    gather_trained_tensors,
    is_adapter_checkpoint,
    load_trained_tensors,
    read_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.internvl_chat.documents import compute_label_weights, get_loss_mask
from internvl.model.internvl_chat.safe_loading import refuse_unsafe_files
from internvl.model.lora import is_peft_model
from internvl.planning.batch_sampler import PlanBatchSampler, count_run_steps
from internvl.planning.data_schedule import DataSchedule
from internvl.planning.data_state import resume_data, save_data_state
from internvl.runtime.signals import ignore_first_sigterm
from internvl.runtime.watchdog import Watchdog
from internvl.train.console import ConsoleCallback
from internvl.train.deepspeed_engine import HookedDeepSpeedEngine
from internvl.train.graceful_stop import GracefulStop
from internvl.train.gradient_check import watch_gradients
from internvl.train.loop_callback import LoopCallback
from internvl.train.param_groups import build_param_groups, count_elements
from internvl.train.skipped_samples import SkippedSampleReport
from internvl.train.step_guard import NonFiniteStepGuard, check_weights_finite

logger = logging.getLogger(__name__)


class InternVLTrainer(Trainer):
    """Trainer of a chat model on the rows of a data schedule.

    Overrides these private methods of transformers (5.22 to 5.23; a test fails with the name of one that has moved):
    `_prepare_inputs`, `_prepare_for_training`, `_get_grad_norm`, `_save_checkpoint`, `_get_output_dir`,
    `_save_optimizer_and_scheduler`, `_load_from_checkpoint`. It calls `_load_optimizer_and_scheduler`.

    Args (beyond those of transformers.Trainer):
        schedule: the epoch plans.
        skipped_samples: report of the samples that are unusable.
        preprocessor: content of `preprocessor_config.json`.
        accept_changed_data: resume even if the data has changed.
        all_gather_loss: average the loss of a step over its loss tokens, across ranks and micro-batches; otherwise
            average the means of its micro-batches.
    """

    args: TrainingArguments
    model: InternVLChatModel
    # transformers declares types that do not hold during a run.
    model_wrapped: Any
    train_dataset: Any
    lr_scheduler: Any
    processing_class: Any

    def __init__(
        self,
        *args,
        schedule: DataSchedule,
        skipped_samples: SkippedSampleReport,
        preprocessor: dict,
        accept_changed_data: bool = False,
        all_gather_loss: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        args = self.args
        args.ignore_data_skip = True  # the batch sampler starts at the position to resume from
        self.schedule, self.skipped_samples, self.preprocessor = schedule, skipped_samples, preprocessor
        self.accept_changed_data, self.all_gather_loss = accept_changed_data, all_gather_loss
        self.epoch = 0
        self.steps_before_epoch = 0  # global step at which `epoch` began
        self.new_unusable_samples: list[str] = []  # on this rank since the last report
        self.mean_step_weight = torch.tensor(0.0)  # mean of `sum_label_weights` over the micro-batches of a step
        self.check_gradients: Callable | None = None  # checks those of the first step

        adapted = any(is_peft_model(module) for module in self.model.children())
        self.saves_adapters_only = adapted and self.model.base_checkpoint is not None and not args.save_full_model
        output_dir = Path(str(args.output_dir))
        self.checkpoints = CheckpointManager(
            output_dir, args.should_save, args.save_total_limit, one_dir_per_node=args.save_on_each_node
        )
        self.guard = NonFiniteStepGuard(args.skip_above_grad_norm, args.max_skipped_steps)
        self.graceful_stop = GracefulStop(self.checkpoints, args.save_on_signal_seconds)
        self.metrics = StepMetrics(args.device)
        self.metrics_file = output_dir / METRICS_FILE
        self.watchdog = Watchdog(args.watchdog_factor, args.watchdog_seconds, args.process_index)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(ConsoleCallback())
        self.add_callback(LoopCallback(self))

    # -- data ----------------------------------------------------------------------------------------------------------

    @property
    def step_in_epoch(self) -> int:
        """Steps of the current epoch that are done."""
        return self.state.global_step - self.steps_before_epoch

    def count_steps(self) -> int:
        """Count the steps of the run, including those before a resumed checkpoint."""
        args = self.args
        return count_run_steps(
            self.schedule, self.epoch, self.steps_before_epoch, args.num_train_epochs, args.max_steps
        )

    def get_train_dataloader(self) -> DataLoader:
        """Build the DataLoader from the current position to the run's end.

        Each rank reads its own column of the plan, so accelerate must not split the batches.
        """
        args, step = self.args, self.step_in_epoch
        num_steps = self.count_steps() - self.state.global_step
        num_workers = min(args.dataloader_num_workers, count_cores_per_rank())  # their number does not affect the data
        return DataLoader(
            self.train_dataset,
            batch_sampler=PlanBatchSampler(self.schedule, args.process_index, self.epoch, step, num_steps),
            collate_fn=self.data_collator,
            num_workers=num_workers,
            worker_init_fn=ignore_first_sigterm,
            prefetch_factor=args.dataloader_prefetch_factor or 2 if num_workers else None,
            multiprocessing_context=args.dataloader_multiprocessing_context if num_workers else None,
            # One iterator lasts for the run, whatever --dataloader_persistent_workers. torch 2.14 would end persistent
            # workers only when it collects the DataLoader, after waiting 5 s for each.
            persistent_workers=False,
            generator=torch.Generator(),  # for the workers' seeds, instead of the global generator
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        self.metrics.timer.mark("data")
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.metrics.timer.mark("other")
        if self.all_gather_loss and batches:
            weight: Any = sum(self.sum_label_weights(batch) for batch in batches)
            weight = weight.to(device)
            self.mean_step_weight = self.accelerator.reduce(weight, "mean") / len(batches)
        return batches, num_items

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Count a batch, move it to the device, normalize its tiles."""
        self.new_unusable_samples += inputs.pop("bad_samples", [])
        self.metrics.count_batch(inputs, inputs.pop("documents", []), self.flops)
        inputs = super()._prepare_inputs(inputs)
        mean, std = self.preprocessor["image_mean"], self.preprocessor["image_std"]
        return inputs | {"pixel_values": normalize_tiles(inputs["pixel_values"], mean, std)}

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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = self.weigh_loss(loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def weigh_loss(self, loss: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Multiply a loss by the weight of its micro-batch in the step."""
        self.metrics.timer.mark("backward")
        return self.guard.propagate_nonfinite_loss(loss) * self.compute_micro_batch_weight(inputs)

    def compute_micro_batch_weight(self, inputs: dict) -> torch.Tensor | float:
        """Compute the weight of a micro-batch in the loss of a step."""
        if self.all_gather_loss:
            return self.sum_label_weights(inputs) / torch.where(self.mean_step_weight == 0, 1.0, self.mean_step_weight)
        # Micro-batches have equal weights. Empty ones in an epoch's last step do not count, as they would lower its
        # loss and gradient.
        step = self.schedule.plan(self.epoch).steps[self.step_in_epoch]  # (accumulation, ranks, micro-batch)
        return step[..., 0].size / (step >= 0).any(-1).sum()

    def sum_label_weights(self, batch: dict) -> torch.Tensor:
        """Add up the weights of a batch's labels, to a scalar."""
        weights = compute_label_weights(batch["labels"], batch["position_ids"], self.model.loss_reduction)
        return weights[:, 1:][get_loss_mask(batch["labels"], batch["position_ids"])].sum()

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
        """Make DeepSpeed skip a step whose gradient norm is too large.

        For non-finite gradients it does so anyway.
        """
        self.metrics.timer.mark("optimizer")
        if self.guard.max_grad_norm is not None and self.guard.check_zero_grad_norm(compute_grad_norm(optimizer)):
            set_grads_to_inf(optimizer)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None) -> float | None:
        norm = super()._get_grad_norm(model, grad_norm)
        norm = self.guard.check_grad_norm(norm.item() if isinstance(norm, torch.Tensor) else norm)
        if self.guard.skip_reason and not self.is_deepspeed_enabled:
            model.zero_grad(set_to_none=True)  # torch's optimizers skip parameters without a gradient
        return norm

    # -- hooks of the loop, called by LoopCallback ---------------------------------------------------------------------

    def begin_run(self) -> None:
        """Prepare the first step, after everything is on its device."""
        args, state = self.args, self.state
        state.num_train_epochs = max(1, -(-state.max_steps // max(1, self.schedule.count_epoch_steps(self.epoch))))
        self.checkpoints.last_saved_step = state.global_step  # above 0 only after resuming
        if self.is_deepspeed_enabled:
            wrapped: Any = self.accelerator.deepspeed_engine_wrapped
            engine = wrapped.engine
            self.accelerator.deepspeed_engine_wrapped = HookedDeepSpeedEngine(engine, self.before_zero_step)
        half = torch.bfloat16 if args.bf16 else torch.float16
        self.metrics.peak_flops, description = get_device_peak(
            args.device, half if args.bf16 or args.fp16 else torch.float32
        )
        logger.info("MFU reference peak: %s", description)
        if state.global_step == 0 and not args.no_smoke_save:
            self.save_trial_checkpoint()
        if args.process_index == 0:
            drop_metrics_after(self.metrics_file, state.global_step)
        for folder in self.list_output_dirs() if args.should_save else []:
            folder.mkdir(parents=True, exist_ok=True)
        self.graceful_stop.begin()
        self.watchdog.start(state.global_step + 1)

    def begin_step(self) -> None:
        """Advance the epoch if all of its steps are done."""
        if self.step_in_epoch == self.schedule.count_epoch_steps(self.epoch):
            self.epoch, self.steps_before_epoch = self.epoch + 1, self.state.global_step

    def end_step(self) -> None:
        """Update counters and decide on logging, saving and stopping."""
        args, state, control = self.args, self.state, self.control
        self.metrics.num_steps += 1
        self.metrics.timer.mark("other")
        self.watchdog.begin_next_step()
        num_steps = self.schedule.count_epoch_steps(self.epoch)
        state.epoch = self.epoch + self.step_in_epoch / num_steps
        if self.step_in_epoch == num_steps:  # for transformers the run is a single epoch
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
        is_skipped = self.guard.end_step(state.global_step, control, self.checkpoints.resume_hint)
        if is_skipped and self.is_deepspeed_enabled and not args.fp16:
            self.lr_scheduler.step()  # transformers does so unless DeepSpeed has skipped the step
        self.graceful_stop.end_step(state.global_step, control, self.list_output_dirs())

    def list_output_dirs(self) -> list[Path]:
        """List the folders that the run writes to: output and TensorBoard."""
        writers = filter(None, (getattr(callback, "tb_writer", None) for callback in self.callback_handler.callbacks))
        return [self.checkpoints.output_dir, *(Path(writer.get_logdir()) for writer in writers)]

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
        is_training = "loss" in logs
        report = {"unusable": self.new_unusable_samples}
        self.new_unusable_samples = []
        if is_training:
            report |= {"nonfinite_loss": self.guard.take_nonfinite_loss(), **self.metrics.take_report()}
        reports = gather_objects(report)
        self.skipped_samples.add(sentence for report in reports for sentence in report["unusable"])
        if is_training:
            logs["loss"] += sum(report["nonfinite_loss"] for report in reports)
            logs.update(combine_rank_reports(reports))
            if self.guard.num_skipped:
                logs["skipped_steps"] = self.guard.num_skipped
        super().log(logs, start_time)
        if is_training and self.args.process_index == 0:
            append_metrics(self.metrics_file, {"step": self.state.global_step, **logs})

    # -- writing checkpoints -------------------------------------------------------------------------------------------

    def get_trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save adapter checkpoint or full model. A collective.

        Raises:
            ValueError: on every rank, if a weight is not finite.
        """
        check_weights_finite(self.get_trainable_parameters(), self.state.global_step)
        folder = Path(output_dir) if output_dir else self.checkpoints.output_dir
        if self.saves_adapters_only:
            tensors = gather_trained_tensors(self.model)
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                save_adapter_checkpoint(self.model, folder, tensors)
                self.processing_class.save_pretrained(folder)
                torch.save(self.args, folder / "training_args.bin")
        else:
            super().save_model(str(folder), _internal_call)
        if self.args.should_save:
            (folder / "preprocessor_config.json").write_text(json.dumps(self.preprocessor, indent=2) + "\n")

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        if self.checkpoints.last_saved_step != self.state.global_step:
            with self.watchdog.during("saving"), self.checkpoints.writing(self.state.global_step):
                super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial) -> str:
        return str(self.checkpoints.current_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        if not (self.is_deepspeed_enabled and self.saves_adapters_only):
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            if self.model_wrapped.zero_optimization():
                save_optimizer_states(
                    self.model_wrapped, self.get_trainable_parameters(), folder, self.args.should_save
                )
            else:
                self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        if self.args.should_save:
            save_data_state(self.schedule, self.epoch, self.step_in_epoch, folder, self.checkpoints.output_dir)

    def save_trial_checkpoint(self) -> None:
        """Write and read a checkpoint before the first step."""

        def write_fn(folder: Path) -> None:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))

        def verify_fn(folder: Path) -> None:
            if self.saves_adapters_only:
                read_trained_tensors(self.model, folder)

        self.checkpoints.write_trial_checkpoint(
            write_fn, verify_fn, sum(map(count_elements, self.get_trainable_parameters().values()))
        )

    # -- resuming ------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Train to the end of the run, from a checkpoint if given.

        Checkpoints are untrusted: no code in them is run.
        """
        if resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            run_on_rank_0(lambda: refuse_unsafe_pickles(checkpoint))
            self.epoch, step = resume_data(self.schedule, checkpoint, self.accept_changed_data)
            self.state.global_step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"]
            self.steps_before_epoch = self.state.global_step - step
            logger.info("Resuming from %s (epoch %d, step %d)", checkpoint.name, self.epoch, step)
        self.args.max_steps = self.count_steps()  # transformers cannot count the steps of a sampler without `__len__`
        try:
            with weights_only_loading(deepspeed=self.is_deepspeed_enabled):
                return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self.watchdog.stop()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if Path(resume_from_checkpoint, OPTIMIZER_STATE_FILE).is_file():
            raise ValueError(f"{resume_from_checkpoint} was written under DeepSpeed: resume with --deepspeed.")
        if is_adapter_checkpoint(resume_from_checkpoint):
            load_trained_tensors(self.model, resume_from_checkpoint)
        else:
            refuse_unsafe_files(resume_from_checkpoint)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None):
        """Prepare model and optimizer; load a checkpoint of DeepSpeed.

        transformers' own loading requires frozen weights in the checkpoint and the same number of ranks.
        """
        resumes_engine = resume_from_checkpoint and self.is_deepspeed_enabled
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, None if resumes_engine else resume_from_checkpoint
        )
        set_collective_timeout(self.args.ddp_timeout_delta)
        if resumes_engine:
            self.load_engine_checkpoint(Path(resume_from_checkpoint))
        return prepared

    def load_engine_checkpoint(self, checkpoint: Path) -> None:
        """Load weights, optimizer states and learning rates into the DeepSpeed engine."""
        engine, has_adapters_only = self.model_wrapped, is_adapter_checkpoint(checkpoint)
        if has_adapters_only:
            load_trained_tensors(self.model, checkpoint)
        load_engine_states(
            engine,
            self.get_trainable_parameters(),
            checkpoint,
            is_rank_0=self.args.process_index == 0,
            strict=not has_adapters_only,
        )
        self._load_optimizer_and_scheduler(str(checkpoint))
        for group, rate in zip(engine.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
