"""The samples of `tools/benchmark_step.py`: sizes from a published mixture, contents random, and the batches that a
plan makes of them. All contenders get these very tensors, so that none pays for tokenizing and decoding."""

import json
from collections.abc import Sequence

import numpy as np
import torch
from tools.benchmark_plan import HISTOGRAM, PADDED, mixture

from internvl.constants import IGNORE_INDEX
from internvl.data.collators import row_collator
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.planning.epoch_plan import EpochPlan, PlanLayout, SampleLengths, plan_epoch
from internvl.planning.sample_cost import Passes, step_cost

from .sizes import ROW_TILES, SPECIAL, TILE_TOKENS, image_token_id, row_tokens

SHORTEST = 8  # tokens of a sample beside its tiles


def sizes_of_samples(config: InternVLChatConfig, samples: int, seed: int = 0) -> SampleLengths:
    """Half of them with pictures, half text (`benchmark_plan.mixture`), in tokens of this model's tiles. Half of what
    is no image token is answer: more than the mixture says, in favour of those who compute all logits."""
    cells = np.array([cell for cells in json.loads(HISTOGRAM.read_text())["sets"].values() for cell in cells])
    drawn, tile = mixture(cells, samples, with_text=True, seed=seed), count_image_tokens(config)
    text = np.maximum(SHORTEST, (drawn.tokens - TILE_TOKENS * drawn.tiles) * tile // TILE_TOKENS)
    text = np.minimum(text, row_tokens(config) - tile * drawn.tiles).astype(np.int32)
    return SampleLengths(text + tile * drawn.tiles, text // 2, drawn.tiles)


def make_samples(config: InternVLChatConfig, lengths: SampleLengths, dtype: torch.dtype, seed: int = 0) -> list[dict]:
    """One Sample for each entry of `lengths`: tiles, question, answer."""
    generator = torch.Generator().manual_seed(seed)
    image, tile, side = image_token_id(config), count_image_tokens(config), config.force_image_size
    samples = []
    for tokens, trained, tiles in zip(*(sizes.tolist() for sizes in lengths), strict=True):
        ids = torch.randint(0, image + 1 - SPECIAL, (tokens,), generator=generator)
        ids[1 : 1 + tiles * tile] = image
        labels = ids.clone()
        labels[: tokens - trained] = IGNORE_INDEX
        samples.append(
            {
                "input_ids": ids,
                "labels": labels,
                "position_ids": torch.arange(tokens),
                "attention_mask": torch.ones(tokens, dtype=torch.bool),
                "pixel_values": torch.randn(tiles, 3, side, side, generator=generator).to(dtype),
                "image_flags": torch.ones(tiles, dtype=torch.int64),
            }
        )
    return samples


def plan_of(
    config: InternVLChatConfig, lengths: SampleLengths, packed: bool, by_length: bool, world_size: int = 1
) -> EpochPlan:
    """A step is a row on each rank, or as many padded batches as hold about that many samples."""
    cost = step_cost(config, Passes(3, 3))
    room = {"max_tokens": row_tokens(config), "max_tiles": ROW_TILES, "cost": cost}
    rows = plan_epoch(lengths, PlanLayout(0, world_size, 1, 1, packed=True, **room), 0)
    if packed:
        return rows
    accumulation = max(1, round(len(lengths.tokens) / (len(rows.starts) - 1) / PADDED))
    return plan_epoch(lengths, PlanLayout(0, world_size, PADDED, accumulation, group_by_length=by_length), 0)


def batches_of(plan: EpochPlan, samples: Sequence[dict], rank: int = 0) -> list[list[dict]]:
    """Step -> micro-batch -> batch of the rows of a rank."""
    steps = []
    for step in plan.steps[:, :, rank].tolist():
        micro_batches = [[plan.row(row) for row in rows if row >= 0] for rows in step]
        steps.append([_batch([[samples[i] for i in row] for row in rows]) for rows in micro_batches if rows])
    return steps


def _batch(rows: list[list[dict]]) -> dict:
    return row_collator([{key: torch.cat([sample[key] for sample in row]) for key in row[0]} for row in rows])


def trained_tokens(batch: dict) -> int:
    return int((batch["labels"] != IGNORE_INDEX).sum())
