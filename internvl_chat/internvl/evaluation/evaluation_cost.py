"""Time of the evaluations of a run, estimated before it starts.

Losses cost the FLOPs of a forward pass. Answers cost the FLOPs of their prompts, and a decoding step per token of the
longest answer of a batch. Such a step has few FLOPs: it takes as long as reading the weights once, or as starting the
modules of the LLM, whichever is longer. Answers are assumed to be as long as their references; the bound assumes
`--eval_max_new_tokens`. Loading samples is not counted, nor gathering weights under ZeRO-3.
"""

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch import nn

from internvl.evaluation.answers import select_samples
from internvl.evaluation.evaluation_data import EvaluationData
from internvl.evaluation.evaluation_plan import plan_evaluation
from internvl.evaluation.settings import EvaluationSettings
from internvl.metrics.device_peak import get_device_peak
from internvl.model.internvl_chat import InternVLChatModel
from internvl.planning.epoch_plan import EpochPlan, SampleCost
from internvl.planning.plan_report import sum_slowest_costs

ASSUMED_MFU = 0.3  # of training and of prompts; predicted for an H100, see docs/performance.md
COPIED_BYTES, NUM_CALLS = 1 << 26, 200  # of a measurement, a few milliseconds each
# Operations per module without children: its own, and reshapes, rotary embedding, cache and residuals around it. With
# transformers 5.24 and torch 2.14, a token of a Qwen2 with 24 such modules takes 5.6 times as long as 24 linear layers.
CALLS_PER_MODULE = 5


class DeviceSpeed(NamedTuple):
    """Speeds of a device.

    Attributes:
        flops: per second, in training.
        num_bytes: per second, read from memory.
        seconds_per_call: to start one operation.
    """

    flops: float
    num_bytes: float
    seconds_per_call: float


# Assumed, from the data sheet; the time of a call is that of a fast CPU.
H100_SPEED = DeviceSpeed(flops=ASSUMED_MFU * 989e12, num_bytes=3e12, seconds_per_call=15e-6)


@lru_cache
def measure_device_speed(device: torch.device, dtype: torch.dtype) -> DeviceSpeed:
    """Measure the speeds of a device."""
    peak, _ = get_device_peak(device, dtype)
    source, target = (torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    linear, vector = nn.Linear(32, 32, device=device, dtype=dtype), torch.ones(1, 32, device=device, dtype=dtype)
    with torch.no_grad():
        copy_seconds = min(measure_seconds(lambda: target.copy_(source)[0].item()) for _ in range(3))
        start_seconds = min(measure_seconds(lambda: [linear(vector) for _ in range(NUM_CALLS)]) for _ in range(3))
    return DeviceSpeed(ASSUMED_MFU * peak, 2 * COPIED_BYTES / copy_seconds, start_seconds / NUM_CALLS)


def measure_seconds(run_fn) -> float:
    start = time.perf_counter()
    run_fn()
    return time.perf_counter() - start


class ModelCost(NamedTuple):
    """What a model costs.

    Attributes:
        training, forward: FLOPs of a sample in a training step, and in a forward pass.
        num_modules, num_llm_modules: modules without children.
        llm_bytes: weights of the LLM.
    """

    training: SampleCost
    forward: SampleCost
    num_modules: int
    num_llm_modules: int
    llm_bytes: int


def describe_model_cost(
    model: InternVLChatModel, training: SampleCost, forward: SampleCost, bytes_per_weight: int | None = None
) -> ModelCost:
    """Describe what a model costs; its weights may be on the meta device.

    Args:
        bytes_per_weight: default: those of the model's weights.
    """
    llm = model.language_model
    llm_bytes = sum(
        # ds_numel: the full size under ZeRO-3
        getattr(weight, "ds_numel", weight.numel()) * (bytes_per_weight or weight.element_size())
        for weight in llm.parameters()
    )
    return ModelCost(training, forward, count_leaf_modules(model), count_leaf_modules(llm), llm_bytes)


def count_leaf_modules(model: nn.Module) -> int:
    return sum(not any(module.children()) for module in model.modules())


@dataclass(frozen=True)
class EvaluationEstimate:
    """Sizes of one evaluation, and the time that it takes.

    Attributes:
        num_passes: forward passes of a rank for the losses.
        num_questions: that are answered.
        answer_length: mean number of tokens of their references.
        num_decoding_steps: of a rank.
        max_answer_seconds: if all answers have `--eval_max_new_tokens`.
    """

    num_passes: int
    num_rows: int
    loss_seconds: float
    num_questions: int
    answer_length: float
    num_decoding_steps: int
    answer_seconds: float
    max_answer_seconds: float

    @property
    def seconds(self) -> float:
        return self.loss_seconds + self.answer_seconds


def estimate_evaluation(
    data: EvaluationData, settings: EvaluationSettings, world_size: int, cost: ModelCost, speed: DeviceSpeed
) -> EvaluationEstimate:
    """Estimate one evaluation of all sets."""
    plan = plan_evaluation(data.lengths, settings, world_size, cost.forward)
    pass_seconds = cost.num_modules * CALLS_PER_MODULE * speed.seconds_per_call
    loss_seconds = sum_slowest_costs(plan, cost.forward.compute(data.lengths)) / speed.flops + len(plan) * pass_seconds

    prompts = data.lengths[select_samples(data, settings.num_samples)].copy()  # (Q,)
    answer_lengths = prompts["loss_tokens"].clip(1, settings.max_new_tokens)
    prompts["tokens"] -= prompts["loss_tokens"]
    prompts["loss_tokens"] = 1  # the logits of the last token
    # Batches of similar prompts, dealt out to the ranks: (rounds, ranks, questions); -1 is an empty slot.
    num_rounds = -(-len(prompts) // (settings.batch_size * world_size))
    slots = np.full(num_rounds * world_size * settings.batch_size, -1)
    slots[: len(prompts)] = np.argsort(-prompts["tokens"], kind="stable")
    slots = slots.reshape(num_rounds, world_size, settings.batch_size)
    prefill_flops = np.append(cost.forward.compute(prompts), 0)[slots].sum(axis=2).max(axis=1).sum()
    num_decoding_steps = int(np.append(answer_lengths, 0)[slots].max(axis=(1, 2)).sum())
    decoding_seconds = max(
        cost.llm_bytes / speed.num_bytes, cost.num_llm_modules * CALLS_PER_MODULE * speed.seconds_per_call
    )
    prefill_seconds = float(prefill_flops) / speed.flops + num_rounds * pass_seconds
    return EvaluationEstimate(
        num_passes=len(plan),
        num_rows=plan.num_rows,
        loss_seconds=loss_seconds,
        num_questions=len(prompts),
        answer_length=float(answer_lengths.mean()) if len(prompts) else 0,
        num_decoding_steps=num_decoding_steps,
        answer_seconds=prefill_seconds + num_decoding_steps * decoding_seconds,
        max_answer_seconds=prefill_seconds + num_rounds * settings.max_new_tokens * decoding_seconds,
    )


def estimate_step_seconds(plan: EpochPlan, lengths: np.ndarray, cost: ModelCost, speed: DeviceSpeed) -> float:
    """Estimate the mean time of a training step."""
    num_passes = plan.steps.shape[1] * cost.training.per_token / cost.forward.per_token  # of a step, backward included
    start_seconds = num_passes * cost.num_modules * CALLS_PER_MODULE * speed.seconds_per_call
    flops = sum_slowest_costs(plan, cost.training.compute(lengths)) / len(plan)
    return flops / speed.flops + start_seconds


def count_evaluations(args: transformers.TrainingArguments, num_steps: int, steps_per_epoch: int) -> int:
    """Count the evaluations of a run, unless it stops early."""
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    if not args.do_train:
        return int(args.do_eval)
    num_evaluations = int(args.eval_on_start)
    if strategy == "steps":
        interval = args.eval_steps or args.logging_steps
        interval = math.ceil(interval * num_steps) if interval < 1 else int(interval)
        first = max(1, math.ceil(args.eval_delay / interval))
        num_evaluations += max(0, num_steps // interval - first + 1)
    if strategy == "epoch":
        num_epochs = math.ceil(num_steps / steps_per_epoch)
        num_evaluations += max(0, num_epochs - max(0, math.ceil(args.eval_delay) - 1))
    return num_evaluations


def format_evaluation_plan(
    data: EvaluationData,
    estimate: EvaluationEstimate,
    num_evaluations: int,
    num_steps: int,
    step_seconds: float,
    device: str,
) -> str:
    """Format what one evaluation runs, and the time of all.

    Args:
        num_steps: of the run.
        device: that times are estimated for.
    """
    names = [f"{entry.name} ({entry.metric})" if entry.metric else entry.name for entry in data.sets]
    lengths, training_seconds = data.lengths, num_steps * step_seconds
    loss_seconds, answer_seconds, max_answer_seconds = (
        num_evaluations * seconds
        for seconds in (estimate.loss_seconds, estimate.answer_seconds, estimate.max_answer_seconds)
    )
    total, max_total = (training_seconds + loss_seconds + seconds for seconds in (answer_seconds, max_answer_seconds))
    questions, share_of_answers = "0", ""
    if estimate.num_questions:
        questions = f"{estimate.num_questions:,}, with references of {estimate.answer_length:.1f} tokens"
        share_of_answers = (
            f"; answers {answer_seconds / total:.1%}, of maximum length {max_answer_seconds / max_total:.1%}"
        )
    lines = {
        "evaluation sets": ", ".join(names),
        "samples": f"{np.count_nonzero(lengths['tokens']):,} ({len(data.skipped_samples):,} skipped)",
        "tokens": f"{lengths['tokens'].sum():,}, of them {lengths['loss_tokens'].sum():,} loss tokens",
        "truncated answers": f"{np.count_nonzero(data.lost_loss_tokens):,}",
        "rows": f"{estimate.num_rows:,}, in {estimate.num_passes:,} forward passes of each rank",
        "questions answered": questions,
        "evaluations": f"{num_evaluations:,}, each as long as {estimate.seconds / step_seconds:.1f} training steps",
        "share of the time": (
            f"{(loss_seconds + answer_seconds) / total:.1%} (estimated for {device}): losses {loss_seconds / total:.1%}"
            f"{share_of_answers}"
        ),
    }
    return "\n".join(f"  {name:20}{text}" for name, text in lines.items())
