"""Records with two answers -> pairs -> batches: what preference optimisation has in place of samples.

    {"question": ..., "chosen": ..., "rejected": ..., "image": ...}

A pair is two conversations over the same pictures, and travels the road of a Sample: `LazySupervisedDataset` reads,
tiles, measures and reports it, `PackedDataset` and the plan place it. `preference_loss.py` takes over from the batch.
"""

from collections.abc import Sequence

import torch

from internvl.constants import UnusableSample
from internvl.data.collators import LIST_KEYS, TILE_KEYS, concat_pad_data_collator, row_collator
from internvl.data.supervised_dataset import LazySupervisedDataset

SIDES = ("chosen", "rejected")
TOKEN_KEYS = ("input_ids", "labels", "position_ids")


class PreferenceDataset(LazySupervisedDataset):
    """Pairs of one data set: `chosen_` and `rejected_` `input_ids`, `labels`, `position_ids`, and the tiles of both.

    A record has the texts `question`, `chosen`, `rejected`, optionally `system_prompt`, and `image` or `video` as
    usual. Its length, measured and planned with, is that of both conversations together.
    """

    def _texts(self, record: dict, tiles: list[int]) -> dict[str, torch.Tensor]:
        pair = {}
        for side in SIDES:
            conversation = record | {"conversations": conversation_with_answer(record, side)}
            try:
                texts = super()._texts(conversation, tiles)
            except UnusableSample as reason:
                raise UnusableSample(f"{side}: {reason}") from reason
            pair |= {f"{side}_{key}": value for key, value in texts.items()}
        return pair


def conversation_with_answer(record: dict, side: str) -> list[dict[str, str]]:
    """The turns that end in the `chosen` or the `rejected` answer."""
    system_prompt = record.get("system_prompt")
    for key in ("question", side, *(["system_prompt"] if system_prompt else [])):
        if not isinstance(record.get(key), str):
            raise UnusableSample(f"{key} must be a text, not {record.get(key)!r:.80}")
    turns = [("human", record["question"]), ("gpt", record[side])]
    turns = [("system", system_prompt), *turns] if system_prompt else turns
    return [{"from": role, "value": text} for role, text in turns]


def pair_collator(pairs: Sequence[dict], pad_id: int = 0) -> dict:
    """B pairs to one batch of 2B rows: all chosen answers, then all rejected ones; the tiles of a pair stand once.

    Args:
        pairs: items of a `PackedDataset` over pairs. An empty row, which has no sides, stands on both.

    Returns:
        `input_ids`, `labels`, `position_ids` (2B, L), `pixel_values`, `image_flags` of the B pairs, `cu_seqlens`,
        `documents`, `bad_samples`.
    """
    rows = [{key: pair.get(f"{side}_{key}", pair.get(key)) for key in TOKEN_KEYS} for side in SIDES for pair in pairs]
    rest = [{key: pair[key] for key in (*TILE_KEYS, *LIST_KEYS)} for pair in pairs]
    return row_collator(rows, pad_id) | concat_pad_data_collator(rest)
