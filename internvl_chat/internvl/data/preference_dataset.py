"""Preference pairs: records with a chosen and a rejected answer.

    {"question": ..., "chosen": ..., "rejected": ..., "image": ...}

A pair is two conversations on the same images. Only its tokenization and its collator differ from those of other
samples (`supervised_dataset.py`).
"""

from collections.abc import Sequence

import torch

from internvl.constants import UnusableSample, shorten
from internvl.data.collators import LIST_KEYS, TILE_KEYS, compute_indices, concat_pad_data_collator
from internvl.data.foreign_keys import ABSENT_VALUES, MEDIA_KEYS
from internvl.data.supervised_dataset import LazySupervisedDataset

SIDES = ("chosen", "rejected")
TOKEN_KEYS = ("input_ids", "labels", "position_ids")


class PreferenceDataset(LazySupervisedDataset):
    """Preference pairs of one dataset.

    A record has the strings `question`, `chosen`, `rejected`, optionally `system_prompt`, and `image` or `video` as in
    other records. A sample has the token tensors `chosen_*` and `rejected_*`, and one set of tiles for both. Its length
    is the sum of both conversations' lengths.
    """

    content_keys = ("question", *SIDES)
    known_keys = (*content_keys, "system_prompt", *MEDIA_KEYS)

    def list_conversations(self, record: dict) -> list[list[dict[str, str]]]:
        return [build_turns(record, side) for side in SIDES]

    def _tokenize_record(self, record: dict, num_tiles: list[int]) -> tuple[dict[str, torch.Tensor], int]:
        pair, num_lost = {}, 0
        for side in SIDES:
            try:
                turns = build_turns(record, side)
                tokens, num_lost_of_side = super()._tokenize_record(record | {"conversations": turns}, num_tiles)
            except UnusableSample as error:
                raise UnusableSample(f"{side}: {error}") from error
            pair |= {f"{side}_{key}": value for key, value in tokens.items()}
            num_lost += num_lost_of_side
        return pair, num_lost


def build_turns(record: dict, side: str) -> list[dict[str, str]]:
    """Build the conversation that ends in the `chosen` or the `rejected` answer."""
    has_system_prompt = record.get("system_prompt") not in ABSENT_VALUES
    roles = {"system_prompt": "system"} if has_system_prompt else {}
    roles |= {"question": "human", side: "gpt"}
    for key in roles:
        if not isinstance(text := record.get(key), str):
            advice = ": write the text alone, without roles" if isinstance(text, list | dict) else ""
            raise UnusableSample(f"{key} must be a string, got {shorten(text)}{advice}")
    return [{"from": role, "value": record[key]} for key, role in roles.items()]


def collate_pairs(pairs: Sequence[dict], pad_id: int = 0, image_token_id: int | None = None) -> dict:
    """Collate B pairs to 2B rows: first all chosen, then all rejected.

    Args:
        pairs: items of a `PackedDataset` of pairs. An empty row has one set of token tensors, used for both sides.

    Returns:
        `input_ids`, `labels`, `position_ids` (2B, L); `pixel_values`, `image_flags`, once per pair; what
        `compute_indices` returns; `documents`, `bad_samples`.
    """
    # `dpo_concat_pad_data_collator` pads each side separately, as in upstream; this model takes both in one batch.
    rows = [{key: pair.get(f"{side}_{key}", pair.get(key)) for key in TOKEN_KEYS} for side in SIDES for pair in pairs]
    tiles_and_lists = [{key: pair[key] for key in (*TILE_KEYS, *LIST_KEYS)} for pair in pairs]
    batch = concat_pad_data_collator(rows, pad_id=pad_id) | concat_pad_data_collator(tiles_and_lists)
    return batch | compute_indices(batch, image_token_id)
