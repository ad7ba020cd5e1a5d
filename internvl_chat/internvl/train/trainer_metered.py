"""HF Trainer that measures its steps: counts each batch before it is sent, and marks where each phase begins.

Between `scheduled.py` and `trainer.py`. What it finds goes into the log, and so to the console, to TensorBoard and
whatever else --report_to names, and as a line to `metrics.jsonl` beside the checkpoints.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from accelerate.utils import DeepSpeedEngineWrapper
from torch import nn

from internvl.dist_utils import gather_objects, world_size
from internvl.metrics.comm_profiler import CommProfiler
from internvl.metrics.device_peak import device_peak
from internvl.metrics.model_flops import ModelFlops, model_flops
from internvl.metrics.step_timer import StepTimer, append_metrics, combine_rank_reports, drop_metrics_after, peak_memory
from internvl.model.internvl_chat.documents import loss_positions
from internvl.runtime.watchdog import Watchdog
from internvl.train.trainer_scheduled import ScheduledTrainer

logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"  # in the output folder


class TimedEngine(DeepSpeedEngineWrapper):
    """accelerate's hold on a DeepSpeed engine, whose `backward` is the optimizer's step too: with a mark in between."""

    def __init__(self, engine: nn.Module, stopwatch: StepTimer, before_step: Callable):
        super().__init__(engine)
        self.stopwatch, self.before_step = stopwatch, before_step

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self.stopwatch.mark("optimizer")
            self.before_step(self.engine.optimizer)
            self.engine.step()


class MeteredTrainer(ScheduledTrainer):
    """Trains as ScheduledTrainer does.

    With --log_level debug and several ranks the first step of each report runs under a profiler, which tells the time
    of communication; else this is part of the phases it happens in.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stopwatch = StepTimer(self.args.device)
        self.counts: Counter[str] = Counter()  # of this rank since the last report
        self.flops_of_batch = 0.0
        self.collectives = CommProfiler(self.args.device) if self.args.log_level == "debug" else None
        self.communication: float | None = None
        self.watchdog = Watchdog(self.args.watchdog_factor, self.args.watchdog_seconds, self.args.process_index)
        self.metrics_file = Path(self.args.output_dir, METRICS_FILE)

    # -- before the first step ---------------------------------------------------------------------------------------

    def _prepare_for_training(self, *args):
        prepared = super()._prepare_for_training(*args)
        half = torch.bfloat16 if self.args.bf16 else torch.float16
        dtype = half if self.args.bf16 or self.args.fp16 else torch.float32
        self.peak, sentence = device_peak(self.args.device, dtype)
        logger.info("100 %% MFU are %s", sentence)
        if self.is_deepspeed_enabled:
            engine = self.accelerator.deepspeed_engine_wrapped.engine
            self.accelerator.deepspeed_engine_wrapped = TimedEngine(engine, self.stopwatch, self.before_zero_step)
        if self.args.process_index == 0:
            drop_metrics_after(self.metrics_file, self.state.global_step)
        self.watchdog.start(self.state.global_step + 1)
        return prepared

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.watchdog.stop()

    @cached_property
    def flops(self) -> ModelFlops:
        """What a step needs, by what is in its batches."""
        return self.flops_needed()

    def flops_needed(self) -> ModelFlops:
        return model_flops(self.model)

    # -- step --------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args):
        if self.collectives and world_size() > 1 and not self.counts["steps"]:
            self.collectives.start()
        self.stopwatch.mark("data")
        batches = super().get_batch_samples(*args)
        self.stopwatch.mark("other")
        return batches

    def _prepare_inputs(self, inputs: dict) -> dict:
        self.count(inputs.pop("documents", []), inputs)
        return super()._prepare_inputs(inputs)

    def count(self, documents: Sequence[int], batch: dict) -> None:
        """Note the work in a batch, still on the CPU; `documents` are the tokens of each that is no padding."""
        trained = int(loss_positions(batch["labels"], batch["position_ids"]).sum())
        tiles = int(batch["image_flags"].sum())
        self.flops_of_batch = self.flops.of(documents, trained, tiles)
        work = {"tokens": sum(documents), "trained": trained, "tiles": tiles, "flops": self.flops_of_batch}
        self.counts.update(work | {"positions": batch["input_ids"].numel()})

    def training_step(self, model: nn.Module, *args, **kwargs) -> torch.Tensor:
        self.stopwatch.mark("forward")
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self.stopwatch.mark("optimizer")
            self.counts["steps"] += 1
            self.watchdog.step_ended()
        return loss

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """What a forward pass runs in: behind it, the backward pass begins."""
        stack = super().compute_loss_context_manager()
        stack.callback(self.stopwatch.mark, "backward")
        return stack

    def floating_point_ops(self, inputs: dict) -> float:
        """For transformers' `total_flos`."""
        return self.flops_of_batch

    # -- reports -----------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        self.stopwatch.mark("other")
        if self.collectives and (seconds := self.collectives.stop()) is not None:
            self.communication = seconds
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args) -> None:
        with self.watchdog.during("saving"):
            super()._save_checkpoint(*args)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what all ranks counted since the last report to a line of the log."""
        training = "loss" in logs
        if training:
            logs.update(combine_rank_reports(gather_objects(self.report()), self.counts["steps"]))
            self.counts.clear()
        super().log(logs, start_time)
        if training and self.args.process_index == 0:
            append_metrics(self.metrics_file, {"step": self.state.global_step, **logs})

    def report(self) -> dict:
        """Of this rank, for `combine_rank_reports`."""
        return {
            "counts": {name: count for name, count in self.counts.items() if name != "steps"},
            "seconds": self.stopwatch.take(),
            "memory": peak_memory(self.args.device),
            "peak": self.peak,
            "communication": self.communication,
        }
