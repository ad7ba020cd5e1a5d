"""InternVLTrainer for preference optimization, with a frozen reference model.

Upstream's class of this name extends trl's DPOTrainer. Its name, flags, metrics and `get_batch_loss_metrics` are kept;
the rest of trl's interface is not supported.
"""

import json
import time
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from internvl.arguments.preference import DPOConfig
from internvl.constants import get_pad_id
from internvl.data.preference_dataset import collate_pairs
from internvl.dist_utils import gather_objects, run_on_rank_0
from internvl.evaluation.evaluation_data import EvaluationData
from internvl.evaluation.model_mode import disabled_adapters, evaluation_mode
from internvl.evaluation.preference_pairs import make_pair_dtype, plan_pairs, summarize_pairs, write_pair_results
from internvl.evaluation.sample_measurement import measure_samples
from internvl.evaluation.settings import EvaluationSettings
from internvl.metrics.model_flops import ModelFlops, count_model_flops
from internvl.model.internvl_chat.documents import get_loss_mask
from internvl.regular_files import read_json
from internvl.train.preference_loss import PreferenceLoss, PreferenceModel
from internvl.train.trainer import InternVLTrainer

USABLE_PAIRS = "is_usable"  # beside the metrics of pairs: whether each pair counts
REWARDS_FILE = "rewards_seen.json"  # in a checkpoint: `PreferenceLoss.rewards_seen`


class MultimodalDPOTrainer(InternVLTrainer):
    """Trainer on pairs of a chosen and a rejected answer.

    Args (beyond those of InternVLTrainer):
        loss: the loss of a micro-batch of pairs.
        reference: frozen copy of the model before training; None if that is the model with its adapters disabled.
    """

    args: DPOConfig

    def __init__(self, *args, loss: PreferenceLoss, reference: PreferenceModel | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss, self.reference = loss, reference
        self.needs_base_model = reference is not None
        # Of this rank's micro-batches since the last report; USABLE_PAIRS among the names.
        self.pair_metrics: list[dict[str, torch.Tensor]] = []

    # -- step ----------------------------------------------------------------------------------------------------------

    def count_flops(self) -> ModelFlops:
        flops = super().count_flops()
        if self.args.reference_free:
            return flops
        has_copy = self.reference is not None
        reference = self.model if self.reference is None else self.reference
        return flops + count_model_flops(reference, backward=False, adapters=has_copy)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, metrics = self.get_batch_loss_metrics(model, inputs)
        self.pair_metrics.append(metrics)
        loss = self.weigh_loss(loss, inputs)
        return (loss, metrics) if return_outputs else loss

    def get_batch_loss_metrics(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss of a batch, and the metrics and USABLE_PAIRS of its pairs."""
        num_loss_tokens = get_loss_mask(batch["labels"], batch["position_ids"]).sum(1)  # (2B,)
        reference = self.compute_reference_log_probs(model, batch)
        loss, is_usable, metrics = self.loss(model(**batch), reference, num_loss_tokens)
        return loss, metrics | {USABLE_PAIRS: is_usable}

    @torch.no_grad()
    def compute_reference_log_probs(self, model: nn.Module, batch: dict) -> torch.Tensor:
        """Compute the reference's log-probabilities of answers: (2B,), without dropout."""
        if self.args.reference_free:
            return torch.zeros(len(batch["labels"]), device=batch["labels"].device)
        if self.reference is not None:
            with self.accelerator.autocast():
                return self.reference_on_device(**batch)
        with evaluation_mode(model), disabled_adapters(self.model):
            return model(**batch)

    @cached_property
    def reference_on_device(self) -> nn.Module:
        """The reference model on its device.

        Under ZeRO-3 it is in a separate DeepSpeed engine, which gathers its partitions.
        """
        assert self.reference is not None
        if not is_deepspeed_zero3_enabled():
            # pyrefly: ignore[bad-argument-type]  # transformers wraps `to`: the checker loses `self`
            return self.reference.to(self.args.device)
        import deepspeed

        plugin: Any = self.accelerator.state.deepspeed_plugin
        config = deepcopy(plugin.deepspeed_config)
        for key in ("optimizer", "scheduler"):
            config.pop(key, None)
        config["zero_optimization"].pop("offload_optimizer", None)
        engine, *_ = deepspeed.initialize(model=self.reference, config=config)
        engine.eval()
        return engine

    # -- reports -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each metric over the pairs of all ranks."""
        if "loss" in logs:  # otherwise these are the metrics of an evaluation, or of the whole run
            own = []
            for metrics in self.pair_metrics:
                is_usable = metrics.pop(USABLE_PAIRS)
                own.append({name: values[is_usable].tolist() for name, values in metrics.items()})
            self.pair_metrics = []
            all_metrics = [metrics for metrics_of_rank in gather_objects(own) for metrics in metrics_of_rank]
            for name in all_metrics[0] if all_metrics else ():
                values = [value for metrics in all_metrics for value in metrics[name]]
                logs[name] = sum(values) / max(1, len(values))
        super().log(logs, start_time)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def measure(self, data: EvaluationData, settings: EvaluationSettings, folder: Path) -> dict[str, float]:
        """Measure loss, rewards and accuracy on evaluation sets of pairs; write the files. A collective.

        The mean reward stays as it is.
        """
        start = time.monotonic()
        pairs = self.measure_pairs(data, settings)
        metrics = summarize_pairs(data, pairs)
        content = {
            "step": self.state.global_step,
            "model": self.args.run_name or self.args.output_dir,
            "seconds": {"loss": round(time.monotonic() - start, 3)},
        }
        run_on_rank_0(lambda: write_pair_results(data, pairs, metrics, folder, **content))
        return metrics

    def measure_pairs(self, data: EvaluationData, settings: EvaluationSettings) -> np.ndarray:
        """Measure each pair of the evaluation sets. A collective.

        Returns:
            (N,) of `make_pair_dtype`, equal on all ranks; zeros where a pair is not evaluated.
        """
        dtype = make_pair_dtype(self.loss.metric_names)

        def measure_batch(batch: dict) -> np.ndarray:
            del batch["documents"]
            num_loss_tokens = get_loss_mask(batch["labels"], batch["position_ids"]).sum(1)  # (2B,)
            reference = self.compute_reference_log_probs(self.model, batch)
            losses, is_usable, metrics = self.loss.measure_pairs(self.model(**batch), reference, num_loss_tokens)
            columns = {"tokens": num_loss_tokens.view(2, -1).sum(0), "loss": losses, **metrics}
            # One copy, for which the CPU waits; float64 holds all values exactly.
            values = torch.stack([is_usable.double(), *(column.double() for column in columns.values())]).cpu().numpy()
            is_usable_row, *rows = values  # (B,) each
            results = np.zeros(int(is_usable_row.sum()), dtype)
            for name, row in zip(columns, rows, strict=True):
                results[name] = row[is_usable_row > 0]
            return results

        plan = plan_pairs(data.lengths, settings, self.args.world_size)
        pad_id, image_token_id = get_pad_id(self.processing_class), self.model.img_context_token_id
        collate_fn = partial(collate_pairs, pad_id=pad_id, image_token_id=image_token_id)
        return measure_samples(self.model, data, settings, plan, collate_fn, measure_batch, dtype)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Train to the end; restore the mean reward when resuming."""
        if resume_from_checkpoint:
            stored = read_json(file := Path(resume_from_checkpoint) / REWARDS_FILE)
            expected = self.loss.rewards_seen
            is_list = isinstance(stored, list) and len(stored) == len(expected)
            if not is_list or not all(type(value) in (int, float) and abs(value) < 1e300 for value in stored):
                raise ValueError(f"{file} is invalid: expected {len(expected)} finite numbers, got {stored!r:.80}.")
            self.loss.rewards_seen = torch.tensor(stored, dtype=expected.dtype)
        return super().train(resume_from_checkpoint, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            path = (Path(output_dir) if output_dir else self.checkpoints.output_dir) / REWARDS_FILE
            path.write_text(json.dumps(self.loss.rewards_seen.tolist()))
