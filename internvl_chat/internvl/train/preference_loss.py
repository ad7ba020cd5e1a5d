"""Preference optimization: from a batch of pairs to log-probabilities to a loss.

As in fine-tuning, the LM head is applied to the hidden states of loss tokens only, in chunks: the full logits are never
in memory.
The reward of an answer is beta * (log p(answer | question) - log p_reference(answer | question)).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import logsigmoid

from internvl.arguments.preference import DPOConfig, PreferenceDataArguments
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.decoder import run_decoder
from internvl.model.internvl_chat.documents import select_loss_tokens
from internvl.model.lora import unwrap_peft
from internvl.model.token_loss import compute_target_log_probs, scale_logits

# -- from a batch to log-probabilities ---------------------------------------------------------------------------------


class PreferenceModel(InternVLChatModel):
    """The chat model with a forward pass that scores pairs of answers."""

    def forward(
        self,
        input_ids,
        labels,
        position_ids,
        pixel_values,
        image_flags,
        cu_seqlens,
        loss_indices,
        image_token_indices,
        tile_indices=None,
    ) -> torch.Tensor:
        """Add up the log-probabilities of each answer.

        The arguments are a batch of `collate_pairs`: first the B chosen answers, then the B rejected ones. Both answers
        of a pair have the same tiles, which are encoded once.

        Returns:
            (2B,) float32.
        """
        visual_features = None
        if len(pixel_values):
            visual_features = self.extract_feature(pixel_values)
            if tile_indices is not None:
                visual_features = visual_features.index_select(0, tile_indices)
            visual_features = visual_features.repeat(2, 1, 1)
        llm = unwrap_peft(self.language_model)
        outputs = run_decoder(
            llm,
            self.embed_inputs(input_ids, visual_features=visual_features, image_token_indices=image_token_indices),
            attention_mask=None,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            use_cache=False,
        )
        head, scale_fn = llm.get_output_embeddings(), partial(scale_logits, llm)
        return label_log_probs(outputs.last_hidden_state, head, labels, loss_indices, scale_fn)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as InternVLChatModel: transformers would write this class into `config.json`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self.config.architectures = [InternVLChatModel.__name__]
        if kwargs.get("is_main_process", True):
            self.config.save_pretrained(save_directory)


def label_log_probs(
    hidden_states: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    loss_indices: torch.Tensor,
    scale_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Add up the log-probabilities of the labels of each row.

    The arguments are those of `compute_token_loss`.

    Returns:
        (B,) float32.
    """
    log_probs = compute_target_log_probs(head, scale_fn, *select_loss_tokens(hidden_states, labels, loss_indices))
    return log_probs.new_zeros(len(labels)).index_add(0, loss_indices // labels.shape[1], log_probs)


# -- from log-probabilities to a loss ----------------------------------------------------------------------------------


class Rewards(NamedTuple):
    """Rewards of B pairs, and the parameters of the losses."""

    chosen: torch.Tensor  # (B,)
    rejected: torch.Tensor  # (B,)
    beta: float
    label_smoothing: float  # probability that chosen and rejected are swapped
    mean_reward: torch.Tensor | float  # over all answers so far

    @property
    def margin(self) -> torch.Tensor:
        return self.chosen - self.rejected


def sigmoid(r: Rewards) -> torch.Tensor:
    """Compute the loss of direct preference optimization.

    Rafailov et al. 2023, arXiv 2305.18290; label smoothing as in Mitchell's note on cDPO.
    """
    return -(1 - r.label_smoothing) * logsigmoid(r.margin) - r.label_smoothing * logsigmoid(-r.margin)


def hinge(r: Rewards) -> torch.Tensor:
    """Compute the hinge loss (SLiC, Zhao et al. 2023, arXiv 2305.10425)."""
    return torch.relu(1 - r.margin)


def ipo(r: Rewards) -> torch.Tensor:
    """Compute the IPO loss (Azar et al. 2023, arXiv 2310.12036).

    Its rewards are means over the tokens of an answer, not sums.
    """
    return ((r.margin - 0.5) / r.beta) ** 2


def bco_pair(r: Rewards) -> torch.Tensor:
    """Compute the loss of binary classifier optimization.

    The reward of a chosen answer should be above the mean of all rewards so far, that of a rejected one below. Jung et
    al. 2024, arXiv 2404.04656.
    """
    return -logsigmoid(r.chosen - r.mean_reward) - logsigmoid(r.mean_reward - r.rejected)


LOSSES: dict[str, Callable[[Rewards], torch.Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "bco_pair": bco_pair,
}


# Metrics of a pair that are reported beside the loss.
PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class PreferenceLoss:
    """Weighted sum of losses, and of the chosen answer's cross entropy (`rpo_alpha`).

    `--loss_type sigmoid,bco_pair --rpo_alpha 1` is mixed preference optimization, Wang et al. 2024, arXiv 2411.10442.

    Attributes:
        rewards_seen: (2,) float64, sum and number of all rewards so far, on all ranks.
    """

    def __init__(self, data_args: PreferenceDataArguments, args: DPOConfig):
        self.args = args
        # Only the losses that upstream combines have a flag for their weight.
        self.weights = {name: getattr(data_args, f"{name}_loss_weight", 1.0) for name in args.loss_type.split(",")}
        self.rewards_seen = torch.zeros(2, dtype=torch.float64)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics of a pair."""
        return (*PAIR_METRICS, "nll_loss") if self.args.rpo_alpha else PAIR_METRICS

    def __call__(
        self, policy: torch.Tensor, reference: torch.Tensor, num_loss_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss and the metrics of a micro-batch, and update the mean reward.

        Args:
            policy, reference: (2B,) log-probabilities of the answers, chosen before rejected.
            num_loss_tokens: (2B,) tokens of each answer.

        Returns:
            The mean loss over usable pairs, 0 without any; whether each pair is usable (B,); the metrics, each (B,).
            Pairs without labels (empty rows) are not usable.
        """
        if "bco_pair" in self.weights:
            rewards, is_usable = self._compute_rewards(policy, reference, num_loss_tokens)
            self._update_mean_reward(rewards.detach(), is_usable)
        losses, is_usable, metrics = self.measure_pairs(policy, reference, num_loss_tokens)
        # Losses of empty rows are finite and have no gradient, so they may stay in the graph.
        loss = (losses * is_usable).sum() / is_usable.sum().clamp(min=1)
        return loss, is_usable, {name: values.detach() for name, values in metrics.items()}

    def measure_pairs(
        self, policy: torch.Tensor, reference: torch.Tensor, num_loss_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Compute loss and metrics of each pair with the present mean reward.

        The arguments are those of a micro-batch.

        Returns:
            The losses (B,), whether each pair is usable (B,), and the metrics, each (B,).
        """
        rewards, is_usable = self._compute_rewards(policy, reference, num_loss_tokens)
        chosen, rejected = rewards
        r = Rewards(chosen, rejected, self.args.beta, self.args.label_smoothing, self.mean_reward)
        losses: Any = sum(weight * LOSSES[name](r) for name, weight in self.weights.items())  # (B,)
        log_probs, num_chosen = policy.view(2, -1), num_loss_tokens.view(2, -1)[0]
        values = (chosen, rejected, (r.margin > 0).float(), r.margin, *log_probs)
        metrics = dict(zip(PAIR_METRICS, values, strict=True))
        if self.args.rpo_alpha:
            metrics["nll_loss"] = nll = -log_probs[0] / num_chosen.clamp(min=1)
            losses = losses + self.args.rpo_alpha * nll
        return losses, is_usable, metrics

    def _compute_rewards(
        self, policy: torch.Tensor, reference: torch.Tensor, num_loss_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute rewards (2, B), and whether each pair has labels (B,)."""
        log_ratios, num_loss_tokens = (policy - reference).view(2, -1), num_loss_tokens.view(2, -1)
        if "ipo" in self.weights:
            log_ratios = log_ratios / num_loss_tokens.clamp(min=1)
        return self.args.beta * log_ratios, (num_loss_tokens > 0).all(0)

    @property
    def mean_reward(self) -> torch.Tensor:
        """Mean of all rewards so far, a float32 scalar; 0 before the first step."""
        return (self.rewards_seen[0] / self.rewards_seen[1].clamp(min=1)).float()

    def _update_mean_reward(self, rewards: torch.Tensor, is_usable: torch.Tensor) -> None:
        """Add the rewards (2, B) of a micro-batch's usable pairs on all ranks to the mean. A collective."""
        new = torch.stack([(rewards * is_usable).sum().double(), 2 * is_usable.sum().double()])
        if dist.is_initialized():
            dist.all_reduce(new)
        self.rewards_seen = self.rewards_seen.to(new.device) + new
