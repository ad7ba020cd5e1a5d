"""Batches of pairs -> log-probabilities of their answers -> loss: the mathematics of preference optimisation.

Between `preference.py`, which makes the pairs, and `trainer_dpo.py`, which trains on them. As everywhere, only states
of label tokens go through the language model head, in chunks, and the full logits never exist.

Throughout, the reward of an answer is beta * (log p(answer | question) - log p_reference(answer | question)).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import logsigmoid

from internvl.arguments.preference import DPOConfig, PreferenceDataArguments
from internvl.model import internvl_chat
from internvl.model.internvl_chat.decoder import decode
from internvl.model.internvl_chat.documents import loss_positions
from internvl.model.lora import unwrap_peft
from internvl.model.token_loss import keep_logits, scale_logits, target_log_probs

# -- from a batch to log-probabilities ---------------------------------------------------------------------------------


class InternVLChatModel(internvl_chat.InternVLChatModel):
    """The chat model, whose forward pass scores pairs. Of the same name, since a checkpoint tells its class by name."""

    def forward(self, input_ids, labels, position_ids, pixel_values, image_flags, cu_seqlens=None) -> torch.Tensor:
        """Batch of `pair_collator` -> (2B,) float32, summed log-probability of each row's labels.

        Both rows of a pair show the same tiles: these pass the vision encoder once.
        """
        visual_features = None
        if len(pixel_values):
            visual_features = self.extract_feature(pixel_values)[image_flags.flatten() == 1].repeat(2, 1, 1)
        llm = unwrap_peft(self.language_model)
        outputs = decode(
            llm,
            self._embed(input_ids, visual_features=visual_features),
            attention_mask=None,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            use_cache=False,
        )
        head, scale = llm.get_output_embeddings(), partial(scale_logits, llm)
        return label_log_probs(outputs.last_hidden_state, head, labels, position_ids, scale)


def label_log_probs(
    hidden_states: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    scale: Callable[[torch.Tensor], torch.Tensor] = keep_logits,
) -> torch.Tensor:
    """Sum over each row of the log-probabilities of its labels, (B,) float32. Arguments as in `token_loss`."""
    trained = loss_positions(labels, position_ids)
    log_probs = target_log_probs(head, scale, hidden_states[:, :-1][trained], labels[:, 1:][trained])
    return log_probs.new_zeros(len(labels)).index_add(0, trained.nonzero()[:, 0], log_probs)


# -- from log-probabilities to a loss ----------------------------------------------------------------------------------


class Rewards(NamedTuple):
    """What a loss sees of B pairs."""

    chosen: torch.Tensor  # (B,)
    rejected: torch.Tensor  # (B,)
    beta: float
    smoothing: float  # probability that a pair is the wrong way round
    shift: torch.Tensor | float  # mean reward so far

    @property
    def margin(self) -> torch.Tensor:
        return self.chosen - self.rejected


def sigmoid(r: Rewards) -> torch.Tensor:
    """Direct preference optimisation, Rafailov et al. 2023, arXiv 2305.18290; smoothed as in Mitchell's cDPO note."""
    return -(1 - r.smoothing) * logsigmoid(r.margin) - r.smoothing * logsigmoid(-r.margin)


def robust(r: Rewards) -> torch.Tensor:
    """DPO without the bias of wrong pairs, Chowdhury et al. 2024, arXiv 2403.00409."""
    right, wrong = -logsigmoid(r.margin), -logsigmoid(-r.margin)
    return ((1 - r.smoothing) * right - r.smoothing * wrong) / (1 - 2 * r.smoothing)


def hinge(r: Rewards) -> torch.Tensor:
    """SLiC, Zhao et al. 2023, arXiv 2305.10425, on DPO's rewards."""
    return torch.relu(1 - r.margin)


def ipo(r: Rewards) -> torch.Tensor:
    """Azar et al. 2023, arXiv 2310.12036; its rewards are means over the tokens of an answer, not sums."""
    return ((r.margin - 0.5) / r.beta) ** 2


def exo_pair(r: Rewards) -> torch.Tensor:
    """Ji et al. 2024, arXiv 2402.00856, equation 16: reverse KL to smoothed preferences, of which it needs some."""
    smoothing = r.smoothing or 1e-3
    right = r.margin.sigmoid() * (logsigmoid(r.margin) - math.log(1 - smoothing))
    return right + (-r.margin).sigmoid() * (logsigmoid(-r.margin) - math.log(smoothing))


def nca_pair(r: Rewards) -> torch.Tensor:
    """Noise contrastive alignment, Chen et al. 2024, arXiv 2402.05369."""
    return -logsigmoid(r.chosen) - 0.5 * (logsigmoid(-r.chosen) + logsigmoid(-r.rejected))


def sppo_hard(r: Rewards) -> torch.Tensor:
    """Self-play preference optimisation with certain preferences, Wu et al. 2024, arXiv 2405.00675."""
    return ((r.chosen - 0.5) / r.beta) ** 2 + ((r.rejected + 0.5) / r.beta) ** 2


def bco_pair(r: Rewards) -> torch.Tensor:
    """Binary classifier optimisation, Jung et al. 2024, arXiv 2404.04656: a chosen answer is to earn more than the mean
    reward so far, a rejected one less."""
    return -logsigmoid(r.chosen - r.shift) - logsigmoid(r.shift - r.rejected)


LOSSES: dict[str, Callable[[Rewards], torch.Tensor]] = {
    loss.__name__: loss for loss in (sigmoid, robust, hinge, ipo, exo_pair, nca_pair, sppo_hard, bco_pair)
}


class PreferenceLoss:
    """Weighted sum of losses, plus `rpo_alpha` times the mean cross entropy of the chosen answer.

    `--loss_type sigmoid,bco_pair --rpo_alpha 1` is mixed preference optimisation, Wang et al. 2024, arXiv 2411.10442.

    Attributes:
        seen: (2,) float64, sum and number of all rewards so far, on all ranks: BCO's shift is their mean.
    """

    def __init__(self, data_args: PreferenceDataArguments, args: DPOConfig):
        self.args = args
        # Losses that never stand in a sum have no weight of their own.
        self.weights = {name: getattr(data_args, f"{name}_loss_weight", 1.0) for name in args.loss_type.split(",")}
        self.seen = torch.zeros(2, dtype=torch.float64)

    def __call__(
        self, policy: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Log-probabilities and numbers of label tokens, (2B,) each, chosen before rejected -> loss and metrics.

        Returns:
            The mean over pairs, 0 if there are none; and of each metric its values, one a pair. Pairs that lack a
            label, which are empty rows, do not count.
        """
        policy, reference, tokens = (side.view(2, -1) for side in (policy, reference, tokens))
        usable = (tokens > 0).all(0)
        ratios = policy - reference
        if "ipo" in self.weights:
            ratios = ratios / tokens.clamp(min=1)
        rewards = self.args.beta * ratios
        shift = self._mean_reward(rewards.detach()[:, usable]) if "bco_pair" in self.weights else 0.0
        r = Rewards(*rewards, self.args.beta, self.args.label_smoothing, shift)
        losses = sum(weight * LOSSES[name](r) for name, weight in self.weights.items())
        metrics = {
            "rewards/chosen": r.chosen,
            "rewards/rejected": r.rejected,
            "rewards/accuracies": (r.margin > 0).float(),
            "rewards/margins": r.margin,
            "logps/chosen": policy[0],
            "logps/rejected": policy[1],
        }
        if self.args.rpo_alpha:
            metrics["nll_loss"] = nll = -policy[0] / tokens[0].clamp(min=1)
            losses = losses + self.args.rpo_alpha * nll
        # Losses of empty rows are finite, and have no gradient: they need not be cut out of the graph.
        loss = (losses * usable).sum() / usable.sum().clamp(min=1)
        return loss, {name: values.detach()[usable] for name, values in metrics.items()}

    def _mean_reward(self, rewards: torch.Tensor) -> torch.Tensor:
        """Mean of all rewards so far, these included. A collective: all ranks must call it."""
        new = torch.stack([rewards.sum().double(), torch.tensor(rewards.numel(), device=rewards.device).double()])
        if dist.is_initialized():
            dist.all_reduce(new)
        self.seen = self.seen.to(new.device) + new
        return (self.seen[0] / self.seen[1].clamp(min=1)).float()
