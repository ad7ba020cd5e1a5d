"""InternVLTrainer on pairs: every step compares what trains with a frozen reference.

Made by `internvl_chat_mpo.py`. Upstream's class of this name stands on trl's DPOTrainer; of that, the name, the flags,
the metrics and `get_batch_loss_metrics` are here, and the rest of trl's interface is not.
"""

import json
from contextlib import ExitStack
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from internvl.dist_utils import gather_objects
from internvl.metrics.model_flops import ModelFlops, model_flops
from internvl.model.internvl_chat.documents import loss_positions
from internvl.model.lora import is_peft_model
from internvl.train.preference_loss import InternVLChatModel, PreferenceLoss
from internvl.train.trainer import InternVLTrainer

REWARDS_FILE = "rewards_seen.json"  # in a checkpoint: what PreferenceLoss.seen holds


class MultimodalDPOTrainer(InternVLTrainer):
    """Trains on the pairs of a plan.

    Args (beyond InternVLTrainer's):
        loss: of the pairs of a micro-batch.
        reference: a frozen copy of the model as training finds it; None where it is the model without its adapters.
    """

    def __init__(self, *args, loss: PreferenceLoss, reference: InternVLChatModel | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss = loss
        self.reference = reference
        self.metrics: list[dict[str, torch.Tensor]] = []  # of this rank's micro-batches since the last report

    # -- step --------------------------------------------------------------------------------------------------------

    def flops_needed(self) -> ModelFlops:
        trained = super().flops_needed()
        if self.args.reference_free:
            return trained
        apart = self.reference is not None
        return trained + model_flops(self.reference if apart else self.model, backward=False, adapters=apart)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, metrics = self.get_batch_loss_metrics(model, inputs)
        self.metrics.append(metrics)
        loss = self.propagate_nonfinite_loss(loss) * self.micro_batch_weight(inputs)
        return (loss, metrics) if return_outputs else loss

    def get_batch_loss_metrics(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of a batch of `pair_collator`, a scalar, and values of each metric, one a pair."""
        tokens = loss_positions(batch["labels"], batch["position_ids"]).sum(1)
        reference = self.reference_log_probs(model, batch)
        return self.loss(model(**batch), reference, tokens)

    @torch.no_grad()
    def reference_log_probs(self, model: nn.Module, batch: dict) -> torch.Tensor:
        """(2B,) log-probabilities of the answers before training, without dropout."""
        if self.args.reference_free:
            return torch.zeros(len(batch["labels"]), device=batch["labels"].device)
        if self.reference is not None:
            with self.accelerator.autocast():
                return self.frozen(**batch)
        model.eval()
        with ExitStack() as stack:
            for part in filter(is_peft_model, self.model.children()):
                stack.enter_context(part.disable_adapter())
            log_probs = model(**batch)
        model.train()
        return log_probs

    @cached_property
    def frozen(self) -> nn.Module:
        """The reference on its device; partitioned by ZeRO-3, in an engine of its own that gathers what it needs."""
        if not is_deepspeed_zero3_enabled():
            return self.reference.to(self.args.device)
        import deepspeed

        config = deepcopy(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        for trained_with in ("optimizer", "scheduler"):
            config.pop(trained_with, None)
        config["zero_optimization"].pop("offload_optimizer", None)
        engine, *_ = deepspeed.initialize(model=self.reference, config=config)
        engine.eval()
        return engine

    # -- reports -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each metric over the pairs of all ranks to a line of the log."""
        mine = [{name: values.tolist() for name, values in metrics.items()} for metrics in self.metrics]
        self.metrics = []
        seen = [metrics for metrics_of_rank in gather_objects(mine) for metrics in metrics_of_rank]
        if "loss" in logs and seen:
            for name in seen[0]:
                values = [value for metrics in seen for value in metrics[name]]
                logs[name] = sum(values) / max(1, len(values))
        super().log(logs, start_time)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As transformers', from a checkpoint's mean reward if there is one."""
        if resume_from_checkpoint:
            stored = json.loads((Path(resume_from_checkpoint) / REWARDS_FILE).read_text())
            self.loss.seen = torch.tensor(stored, dtype=torch.float64)
        return super().train(resume_from_checkpoint, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            path = Path(output_dir or self.args.output_dir) / REWARDS_FILE
            path.write_text(json.dumps(self.loss.seen.tolist()))
