"""Rows to a batch: the last station before the model.

Padding is one more document: token `pad_id`, label -100, positions 0, 1, 2, ... So attention by positions never lets a
real token see it, and no mask is needed. A mask that the rows do carry is padded with False; it is never guessed from
token ids, since a real token may have the id of padding.
"""

from collections.abc import Sequence

import torch

from internvl.model.token_loss import document_bounds
from internvl.train.constants import IGNORE_INDEX

# Tensors along tokens: type, and what stands behind the end of a row; `_pad` puts in `pad_id` and positions.
TOKENS = {
    "input_ids": (torch.int64, 0),
    "labels": (torch.int64, IGNORE_INDEX),
    "attention_mask": (torch.bool, False),
    "position_ids": (torch.int64, 0),
    "loss_weight": (torch.float32, 0.0),
}
TILES = ("pixel_values", "image_flags")
LISTS = ("documents", "bad_samples")  # for the trainer, not for the model


def concat_pad_data_collator(features: Sequence[dict], max_item_length: int | None = None, pad_id: int = 0) -> dict:
    """Pad B rows to (B, L) and concatenate their tiles.

    Args:
        features: rows with `input_ids`, `labels`, `position_ids` (L_b,), `pixel_values` (T_b, 3, S, S), `image_flags`
            (T_b,); optionally `attention_mask`, `loss_weight` (L_b,) and the lists `documents` and `bad_samples` of a
            `PackedDataset`. The first row's keys count.
        max_item_length: L, if not that of the longest row.

    Returns:
        Token tensors (B, L), tile tensors (sum T_b, ...), one list each of `documents` and `bad_samples`, anything else
        stacked; strings are dropped.

    Raises:
        ValueError: a row is longer than `max_item_length`.
    """
    return _collate(features, pad_id, padded=TOKENS, joined=TILES, length=max_item_length)


def row_collator(rows: Sequence[dict], pad_id: int = 0, max_item_length: int | None = None) -> dict:
    """`concat_pad_data_collator` for training: with `cu_seqlens`, where documents begin in the rows laid end to end,
    and the number of all tokens. A list, so that it stays on the CPU and no layer waits for the device to know it."""
    batch = concat_pad_data_collator(rows, max_item_length, pad_id)
    return batch | {"cu_seqlens": document_bounds(batch["position_ids"])}


def pad_data_collator(features: Sequence[dict], pad_id: int = 0) -> dict:
    """Pad `input_ids`, `labels` and `attention_mask` to (B, L) and stack everything else, tiles too."""
    return _collate(features, pad_id, padded=("input_ids", "labels", "attention_mask"), joined=())


def dpo_concat_pad_data_collator(features: Sequence[dict], pad_id: int = 0) -> dict:
    """Like `concat_pad_data_collator` for keys `chosen_*` and `rejected_*`; each side has its own L."""
    padded = [side + key for side in ("chosen_", "rejected_") for key in TOKENS]
    return _collate(features, pad_id, padded, joined=TILES)


def _collate(features: Sequence[dict], pad_id: int, padded, joined, length: int | None = None) -> dict:
    batch = {}
    for key, first in features[0].items():
        rows = [row[key] for row in features]
        if key in padded:
            batch[key] = _pad(key, rows, pad_id, length or max(map(len, rows)))
        elif key in joined:
            batch[key] = torch.cat([torch.as_tensor(row) for row in rows])
        elif key in LISTS:
            batch[key] = [entry for row in rows for entry in row]
        elif not isinstance(first, str | None):
            batch[key] = torch.stack([torch.as_tensor(row) for row in rows])
    return batch


def _pad(key: str, rows: Sequence, pad_id: int, length: int) -> torch.Tensor:
    """Rows (L_b,) to one tensor (B, length)."""
    key = key.removeprefix("chosen_").removeprefix("rejected_")
    dtype, fill = TOKENS[key]
    longest = max(map(len, rows))
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit into {length}.")
    padded = torch.full((len(rows), length), pad_id if key == "input_ids" else fill, dtype=dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.as_tensor(row)
        if key == "position_ids":
            target[len(row) :] = torch.arange(length - len(row))
    return padded
