"""Loss, perplexity and token accuracy of evaluation sets.

The losses are plain cross entropies of loss tokens, without label weights and without the loss of experts. Rows are
packed. The sums of each sample are added up in the order of samples, in float64: the number of ranks and the size of
rows change them only by the rounding errors of a forward pass.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from internvl.constants import get_pad_id
from internvl.data.schema import BASE_ANSWERS_SPLIT
from internvl.dist_utils import get_world_size
from internvl.evaluation.evaluation_data import EvaluationData
from internvl.evaluation.evaluation_plan import plan_evaluation
from internvl.evaluation.sample_measurement import collate_packed, measure_samples
from internvl.evaluation.settings import EvaluationSettings
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.lora import unwrap_peft
from internvl.model.varlen_attention import can_pack_documents
from internvl.planning.sample_cost import compute_forward_cost

# Result of a sample: sum of the cross entropy over its loss tokens, their number, how many of them are the argmax.
TOKEN_LOSSES = np.dtype([("loss_sum", np.float64), ("tokens", np.int64), ("correct", np.int64)])
# Type of rotary embedding -> function from configuration and scaling to the length from which on frequencies change.
ROPE_LIMITS: dict[str, Callable[[Any, dict], int]] = {
    "dynamic": lambda config, scaling: config.max_position_embeddings,
    "longrope": lambda config, scaling: scaling["original_max_position_embeddings"],
}
MAX_LOG_PERPLEXITY = 700.0  # exp(710) is infinite in float64, and JSON has no infinity


def measure_token_losses(model: InternVLChatModel, data: EvaluationData, settings: EvaluationSettings) -> np.ndarray:
    """Measure the token losses of all evaluated samples. A collective.

    Returns:
        (N,) of TOKEN_LOSSES, equal on all ranks; zeros where a sample is not evaluated.
    """
    max_shared = get_max_shared_tokens(unwrap_peft(model.language_model))
    plan = plan_evaluation(data.lengths, settings, get_world_size(), compute_forward_cost(model), max_shared)
    pad_id = get_pad_id(data.dataset.datasets[0].tokenizer)
    collate_fn = partial(collate_packed, pad_id=pad_id, image_token_id=model.img_context_token_id)
    return measure_samples(model, data, settings, plan, collate_fn, partial(measure_row, model), TOKEN_LOSSES)


def get_max_shared_tokens(llm: PreTrainedModel) -> int | None:
    """Return the length above which a sample cannot share a row with others.

    It is None for most LLMs. In some the longest document of a row decides on the rotary embedding of all. Others, such
    as recurrent ones, do not keep documents apart: there each sample has a row of its own.
    """
    if not can_pack_documents(llm):
        return 1
    config: Any = llm.config
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    return ROPE_LIMITS[kind](config, scaling) if kind in ROPE_LIMITS else None


def measure_row(model: InternVLChatModel, row: dict) -> np.ndarray:
    """Measure the samples of a packed row.

    Args:
        row: batch of one row, without padding; `documents` has the number of tokens of each sample.

    Returns:
        (samples,) of TOKEN_LOSSES.
    """
    documents = row.pop("documents")
    losses, is_correct = model(**row, per_token_loss=True)  # (n,)
    results = np.zeros(len(documents), TOKEN_LOSSES)
    if documents:
        # One copy, for which the CPU waits; float64 holds all values exactly.
        columns = torch.stack([row["loss_indices"].double(), losses.double(), is_correct.double()])  # (3, n)
        indices, losses, is_correct = columns.cpu().numpy()
        sample = np.searchsorted(np.cumsum(documents), indices, side="right")  # (n,) that each loss token belongs to
        results["loss_sum"] = np.bincount(sample, losses, len(documents))
        results["tokens"] = np.bincount(sample, minlength=len(documents))
        results["correct"] = np.bincount(sample, is_correct, len(documents))
    return results


def summarize_token_losses(data: EvaluationData, losses: np.ndarray) -> dict[str, float]:
    """Compute the metrics of token losses, each over all loss tokens.

    Args:
        losses: (N,) of TOKEN_LOSSES.

    Returns:
        `NAME/loss`, `NAME/perplexity` and `NAME/token_accuracy` of each set. Without NAME, the same over all sets of
        answers that are not the base model's; `forgetting` is the loss on the base model's answers. What has no loss
        tokens is left out.
    """
    parts = np.split(losses, data.dataset.ends[:-1])
    metrics = {}
    for entry, part in zip(data.sets, parts, strict=True):
        metrics |= {f"{entry.name}/{name}": value for name, value in compute_loss_metrics(part).items()}
    groups = {True: [losses[:0]], False: [losses[:0]]}  # whether these are the base model's answers
    for entry, part in zip(data.sets, parts, strict=True):
        groups[entry.split == BASE_ANSWERS_SPLIT].append(part)
    of_base_answers = compute_loss_metrics(np.concatenate(groups[True]))
    metrics |= {"forgetting": of_base_answers["loss"]} if of_base_answers else {}
    return metrics | compute_loss_metrics(np.concatenate(groups[False]))


def compute_loss_metrics(losses: np.ndarray) -> dict[str, float]:
    """Compute loss, perplexity and token accuracy over all loss tokens.

    Returns:
        Nothing if there are none.
    """
    num_tokens = int(losses["tokens"].sum())
    if not num_tokens:
        return {}
    loss = float(losses["loss_sum"].sum()) / num_tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, MAX_LOG_PERPLEXITY)),
        "token_accuracy": int(losses["correct"].sum()) / num_tokens,
    }
