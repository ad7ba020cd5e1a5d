"""Random samples of `tools/benchmark_step.py` and their batches.

Lengths come from a published mixture, contents are random. All contenders get the same tensors, so the benchmark has
no tokenizing and no image decoding.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch

from internvl.constants import IGNORE_INDEX
from internvl.data.collators import collate_rows
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.planning.epoch_plan import EpochPlan, PlanLayout, make_sample_lengths, plan_epoch
from internvl.planning.sample_cost import count_forward_flops, scale_to_training
from internvl.tools.benchmark_plan import PADDED_BATCH_SIZE, draw_mixture

from .sizes import NUM_RESERVED_IDS, ROW_TILES, TILE_TOKENS, get_image_token_id, get_max_row_tokens

MIN_TEXT_TOKENS = 8  # tokens of a sample besides its image tokens
# --mixtures -> whether half of the samples have text only.
MIXTURES = {"with text": True, "images": False}


def draw_sample_lengths(
    config: InternVLChatConfig, num_samples: int, mixture: str = "with text", seed: int = 0
) -> np.ndarray:
    """Draw the sample lengths of a mixture.

    Lengths count in this model's tokens per tile. Half of the text tokens are loss tokens. That is more than in the
    mixture and favors contenders that compute the logits of all tokens.
    """
    drawn, tile_tokens = draw_mixture(num_samples, MIXTURES[mixture], seed), count_image_tokens(config)
    text = np.maximum(MIN_TEXT_TOKENS, (drawn["tokens"] - TILE_TOKENS * drawn["tiles"]) * tile_tokens // TILE_TOKENS)
    text = np.minimum(text, get_max_row_tokens(config) - tile_tokens * drawn["tiles"]).astype(np.int32)
    return make_sample_lengths(text + tile_tokens * drawn["tiles"], text // 2, drawn["tiles"])


def make_random_samples(
    config: InternVLChatConfig, lengths: np.ndarray, dtype: torch.dtype, seed: int = 0
) -> list[dict]:
    """Make a random sample of each length: image tokens, prompt, answer."""
    generator = torch.Generator().manual_seed(seed)
    image_token, tile_tokens = get_image_token_id(config), count_image_tokens(config)
    side: Any = config.force_image_size
    samples = []
    for num_tokens, num_loss_tokens, num_tiles in lengths.tolist():
        input_ids = torch.randint(0, image_token + 1 - NUM_RESERVED_IDS, (num_tokens,), generator=generator)
        input_ids[1 : 1 + num_tiles * tile_tokens] = image_token
        labels = input_ids.clone()
        labels[: num_tokens - num_loss_tokens] = IGNORE_INDEX
        samples.append(
            {
                "input_ids": input_ids,
                "labels": labels,
                "position_ids": torch.arange(num_tokens),
                "attention_mask": torch.ones(num_tokens, dtype=torch.bool),
                "pixel_values": torch.randn(num_tiles, 3, side, side, generator=generator).to(dtype),
                "image_flags": torch.ones(num_tiles, dtype=torch.int64),
            }
        )
    return samples


def plan_rows(
    config: InternVLChatConfig, lengths: np.ndarray, packed: bool, group_by_length: bool, world_size: int = 1
) -> EpochPlan:
    """Plan one packed row per rank and step, or padded batches.

    A step of padded batches accumulates until it has about as many samples as a packed row.
    """
    limits = {"max_tokens": get_max_row_tokens(config), "max_tiles": ROW_TILES}
    sample_cost = scale_to_training(count_forward_flops(config), vision_passes=3, llm_passes=3)
    packed_plan = plan_epoch(
        lengths, PlanLayout(0, world_size, 1, 1, packed=True, **limits, sample_cost=sample_cost), 0
    )
    if packed:
        return packed_plan
    num_rows = packed_plan.num_rows
    accumulation = max(1, round(len(lengths) / num_rows / PADDED_BATCH_SIZE))
    return plan_epoch(
        lengths, PlanLayout(0, world_size, PADDED_BATCH_SIZE, accumulation, group_by_length=group_by_length), 0
    )


def split_into_turns(lengths: np.ndarray, num_turns: int) -> np.ndarray:
    """Split samples into turns of whole padded batches of similar length.

    Returns:
        (num_turns, samples of a turn), sample ids.
    """
    plan = plan_epoch(lengths, PlanLayout(0, 1, PADDED_BATCH_SIZE, 1, group_by_length=True), 0)
    batches = [plan.get_row_samples(row) for row in plan.steps.ravel()]
    return np.array(batches).reshape(num_turns, -1)


def build_batches(
    plan: EpochPlan, samples: Sequence[dict], rank: int = 0, image_token_id: int | None = None
) -> list[list[dict]]:
    """Build a rank's batches: one list of micro-batches per step.

    Args:
        image_token_id: of `collate_rows`.
    """
    # An older checkout (`benchmark_step.py --against`) may lack the argument.
    accepted = signature(collate_rows).parameters
    options = {"image_token_id": image_token_id} if "image_token_id" in accepted else {}
    steps = []
    for step in plan.steps[:, :, rank].tolist():
        micro_batches = [[plan.get_row_samples(row) for row in rows if row >= 0] for rows in step]
        steps.append([_collate([[samples[i] for i in row] for row in rows], options) for rows in micro_batches if rows])
    return steps


def _collate(rows: list[list[dict]], options: dict) -> dict:
    merged = [{key: torch.cat([sample[key] for sample in row]) for key in row[0]} for row in rows]
    return collate_rows(merged, **options)


def count_loss_tokens(batch: dict) -> int:
    """Count the labels of a batch that are not ignored."""
    return int((batch["labels"] != IGNORE_INDEX).sum())
