"""HF Trainer with one optimizer group a part, and reports of bad samples.

Made by `build.py`; checkpoints are `checkpointing.py`'s, steps `scheduled.py`'s, reports of speed `metered.py`'s,
everything else of a run (loop, DeepSpeed, learning rates, TensorBoard) is transformers' own.
"""

import logging
from collections.abc import Callable

import torch

from internvl.constants import UnusableSample
from internvl.data.images import normalize
from internvl.dist_utils import gather_objects
from internvl.model.internvl_chat.documents import document_weights, loss_positions
from internvl.train.gradient_check import watch_gradients
from internvl.train.param_groups import build_param_groups
from internvl.train.trainer_metered import MeteredTrainer

logger = logging.getLogger(__name__)


def label_weights(batch: dict, reduction: str) -> torch.Tensor:
    """Weights (n,) of the labels of a batch that are trained."""
    weights = document_weights(batch["labels"], batch["position_ids"], reduction)
    return weights[:, 1:][loss_positions(batch["labels"], batch["position_ids"])]


class InternVLTrainer(MeteredTrainer):
    """Trains a chat model.

    Args (beyond MeteredTrainer's):
        bad_samples: sentences on the samples that measuring already found unusable.
        max_bad_samples: how many unusable samples may be left out before the run stops.
        all_gather: a step's loss is the weighted mean over all its trained tokens, whatever rank and micro-batch they
            are in; otherwise the mean of the micro-batches' means.
    """

    def __init__(
        self,
        *args,
        bad_samples: list[str],
        max_bad_samples: int,
        all_gather: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.all_gather = all_gather
        self.weight_of_step = 0.0  # of all labels of a micro-batch, in the mean over ranks and accumulation
        self.bad_samples = list(bad_samples)
        self.max_bad_samples = max_bad_samples
        self.found_bad: list[str] = []  # by this rank, since the last report
        self.check_gradients: Callable | None = None

    # -- data --------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.all_gather:
            weight = sum(label_weights(batch, self.model.loss_reduction).sum() for batch in batches).to(device)
            self.weight_of_step = self.accelerator.reduce(weight, "mean") / max(1, len(batches))
        return batches, items

    def _prepare_inputs(self, inputs: dict) -> dict:
        self.found_bad += inputs.pop("bad_samples", [])
        inputs = super()._prepare_inputs(inputs)
        means = self.preprocessor["image_mean"], self.preprocessor["image_std"]
        return inputs | {"pixel_values": normalize(inputs["pixel_values"], *means)}

    # -- step --------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """For offloaded states accelerate makes DeepSpeed's own of it, which is AdamW only where this is torch's."""
        if self.optimizer is None:
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = build_param_groups(self.model, self.args)
            self.optimizer = optimizer_class(groups, **kwargs)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = self.propagate_nonfinite_loss(loss) * self.micro_batch_weight(inputs)
        return (loss, outputs) if return_outputs else loss

    def micro_batch_weight(self, inputs: dict) -> torch.Tensor | float:
        """What a micro-batch counts in the mean over ranks and accumulation."""
        if self.all_gather:
            mine = label_weights(inputs, self.model.loss_reduction).sum()
            return mine / torch.where(self.weight_of_step == 0, 1.0, self.weight_of_step)
        # All count alike; the empty ones of an epoch's last step must not make its loss and gradient smaller.
        step = self.schedule.plan(self.epoch).steps[self.state.global_step - self.first_step]
        return step[..., 0].size / (step >= 0).any(-1).sum()

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self.check_gradients is None:
            self.check_gradients = watch_gradients(self.model.named_parameters())
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.check_gradients(finite=self.state.global_step == 0)
            self.check_gradients = lambda finite: None
        return loss

    # -- reports -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report the bad samples that any rank met."""
        reports, self.found_bad = gather_objects(self.found_bad), []
        self.report_bad_samples([sentence for found in reports for sentence in found])
        super().log(logs, start_time)

    def report_bad_samples(self, found: list[str]) -> None:
        new = [sentence for sentence in dict.fromkeys(found) if sentence not in self.bad_samples]
        self.bad_samples += new
        for sentence in new:
            logger.warning("left out: %s", sentence)
        if new and len(self.bad_samples) > self.max_bad_samples:
            raise too_many_bad_samples_error(self.bad_samples, self.max_bad_samples)


def too_many_bad_samples_error(sentences: list[str], allowed: int) -> UnusableSample:
    """The error that ends a run: how many samples are unusable, and the list of them."""
    shown = "\n".join(f"  {sentence}" for sentence in sentences[:20])
    more = f"\n  ... and {len(sentences) - 20} more" if len(sentences) > 20 else ""
    return UnusableSample(
        f"{len(sentences)} samples cannot be used, --max_bad_samples allows {allowed}; mend or remove them:\n"
        f"{shown}{more}"
    )
