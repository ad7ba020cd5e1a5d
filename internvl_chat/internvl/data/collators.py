"""Rows to a batch: the last station before the model.

Padding is one more document: token `pad_id`, label -100, positions 0, 1, 2, ... So attention by positions never lets a
real token see it, and no mask is needed. A mask that the rows do carry is padded with False; it is never guessed from
token ids, since a real token may have the id of padding.
"""

from collections.abc import Callable, Sequence

import torch

from internvl.constants import IGNORE_INDEX
from internvl.model.internvl_chat.documents import REDUCTIONS, document_begins, document_bounds

# Tensors along tokens: type, and what stands behind the end of a row; `_pad` puts in `pad_id` and positions.
TOKEN_TENSORS = {
    "input_ids": (torch.int64, 0),
    "labels": (torch.int64, IGNORE_INDEX),
    "attention_mask": (torch.bool, False),
    "position_ids": (torch.int64, 0),
    "loss_weight": (torch.float32, 0.0),
}
TILE_KEYS = ("pixel_values", "image_flags")
LIST_KEYS = ("documents", "bad_samples")  # for the trainer, not for the model


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
    return _collate(features, pad_id, padded=TOKEN_TENSORS, joined=TILE_KEYS, length=max_item_length)


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
    padded = [side + key for side in ("chosen_", "rejected_") for key in TOKEN_TENSORS]
    return _collate(features, pad_id, padded, joined=TILE_KEYS)


def _collate(features: Sequence[dict], pad_id: int, padded, joined, length: int | None = None) -> dict:
    batch = {}
    for key, first in features[0].items():
        rows = [row[key] for row in features]
        if key in padded:
            batch[key] = _pad(key, rows, pad_id, length or max(map(len, rows)))
        elif key in joined:
            batch[key] = torch.cat([torch.as_tensor(row) for row in rows])
        elif key in LIST_KEYS:
            batch[key] = [entry for row in rows for entry in row]
        elif not isinstance(first, str | None):
            batch[key] = torch.stack([torch.as_tensor(row) for row in rows])
    return batch


def _pad(key: str, rows: Sequence, pad_id: int, length: int) -> torch.Tensor:
    """Rows (L_b,) to one tensor (B, length)."""
    key = key.removeprefix("chosen_").removeprefix("rejected_")
    dtype, fill = TOKEN_TENSORS[key]
    longest = max(map(len, rows))
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit into {length}.")
    padded = torch.full((len(rows), length), pad_id if key == "input_ids" else fill, dtype=dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.as_tensor(row)
        if key == "position_ids":
            target[len(row) :] = torch.arange(length - len(row))
    return padded


# -- upstream's packed batches ---------------------------------------------------------------------------------------


def len2weight(x: int, loss_reduction: str) -> float:
    """Weight of a label of a document of `x` labels; 0 for none."""
    if loss_reduction not in REDUCTIONS:
        raise NotImplementedError(f"loss_reduction {loss_reduction!r} is not one of {', '.join(REDUCTIONS)}.")
    return REDUCTIONS[loss_reduction](x) if x else 0.0


def packed_collate_fn(
    features: Sequence[dict],
    data_collator: Callable = concat_pad_data_collator,
    len2weight: Callable[[int], float] = lambda n: 1.0,
    max_item_length: int = 0,
    micro_num: int = 1,
    loss_reduction_all_gather: bool = False,
    pad_id: int = 0,
) -> dict:
    """Upstream's batch of rows, for code written for it; the trainer has `row_collator`.

    Args:
        features: at most `micro_num` rows; fewer are filled up with copies of the first that train nothing.
        len2weight: weight of each label of a document of so many labels.
        max_item_length: tokens to pad to; 0 for the longest row.

    Returns:
        What `data_collator` gives, `loss_weight` as a nested list, `loss_reduction_all_gather`, `statistics`
        (documents, padded tokens, tiles of flag 0), and as `attention_mask` int32 (micro_num, documents + 1): where
        documents begin.

    Raises:
        NotImplementedError: more rows than `micro_num`.
        ValueError: rows of different numbers of documents, whose bounds cannot be one tensor.
    """
    if len(features) > micro_num:
        raise NotImplementedError(f"{len(features)} rows for a micro-batch of {micro_num}")
    keys = ("input_ids", "labels", "position_ids", "pixel_values", "image_flags")
    rows = [{key: torch.as_tensor(row[key]) for key in keys} for row in features]
    rows += [rows[0] | {"labels": torch.full_like(rows[0]["labels"], IGNORE_INDEX)}] * (micro_num - len(rows))
    lengths = [len(row["input_ids"]) for row in rows]
    width, bounds, weights = max_item_length or max(lengths), [], []
    for row, length in zip(rows, lengths, strict=True):
        bounds.append(document_bounds(row["position_ids"][None]) + ([width] if length < width else []))
        document = document_begins(row["position_ids"][None])[0].cumsum(0) - 1
        counts = torch.bincount(document, (row["labels"] != IGNORE_INDEX).float())[document].tolist()
        trained = (row["labels"] != IGNORE_INDEX).tolist()
        weights.append([len2weight(int(n)) if one else 0.0 for n, one in zip(counts, trained, strict=True)])
        weights[-1] += [0.0] * (width - length)
    if len({len(row) for row in bounds}) > 1:
        raise ValueError(
            f"rows of {', '.join(str(len(row) - 1) for row in bounds)} documents do not fit into one tensor"
        )
    documents = sum(int((row["position_ids"] == 0).sum()) for row in rows[: len(features)])
    blank = sum(int((row["image_flags"] == 0).sum()) for row in rows)
    return data_collator(rows, max_item_length=width, pad_id=pad_id) | {
        "attention_mask": torch.tensor(bounds, dtype=torch.int32),
        "loss_weight": weights,
        "loss_reduction_all_gather": loss_reduction_all_gather,
        "statistics": torch.tensor([documents, len(rows) * width - sum(lengths), blank]),
    }
