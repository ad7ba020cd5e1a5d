"""Random samples of `tools/benchmark_step.py` and their batches.

Lengths come from a published mixture, contents are random. All contenders get the same tensors, so the benchmark has
no tokenizing and no image decoding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tools.benchmark_plan import PADDED_BATCH_SIZE, draw_mixture

from internvl.constants import IGNORE_INDEX
from internvl.data.collators import collate_rows
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.planning.epoch_plan import EpochPlan, PlanLayout, make_sample_lengths, plan_epoch
from internvl.planning.sample_cost import count_forward_flops, scale_to_training

from .sizes import NUM_RESERVED_IDS, ROW_TILES, TILE_TOKENS, get_image_token_id, get_max_row_tokens

MIN_TEXT_TOKENS = 8  # tokens of a sample besides its image tokens


def draw_sample_lengths(config: InternVLChatConfig, num_samples: int, seed: int = 0) -> np.ndarray:
    """Draw sample lengths, half with images and half text only.

    Lengths count in this model's tokens per tile. Half of the text tokens are loss tokens. That is more than in the
    mixture and favors contenders that compute the logits of all tokens.
    """
    drawn, tile_tokens = draw_mixture(num_samples, with_text=True, seed=seed), count_image_tokens(config)
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


def build_batches(plan: EpochPlan, samples: Sequence[dict], rank: int = 0) -> list[list[dict]]:
    """Build a rank's batches: one list of micro-batches per step."""
    steps = []
    for step in plan.steps[:, :, rank].tolist():
        micro_batches = [[plan.get_row_samples(row) for row in rows if row >= 0] for rows in step]
        steps.append([_collate([[samples[i] for i in row] for row in rows]) for rows in micro_batches if rows])
    return steps


def _collate(rows: list[list[dict]]) -> dict:
    return collate_rows([{key: torch.cat([sample[key] for sample in row]) for key in row[0]} for row in rows])


def count_loss_tokens(batch: dict) -> int:
    """Count the labels of a batch that are not ignored."""
    return int((batch["labels"] != IGNORE_INDEX).sum())
