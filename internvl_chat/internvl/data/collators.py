"""Collate rows to the batch that the model takes.

A row is a sample or a packed sequence. Padding is one more document: token `pad_id`, label -100, positions 0, 1, 2, ...
Documents do not attend to each other, so padding needs no attention mask. If rows have a mask, it is padded with
False. It is never derived from token ids, because a real token may have the id of the padding token.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from internvl.constants import IGNORE_INDEX
from internvl.data.images import normalize_tiles
from internvl.model.internvl_chat.documents import (
    LOSS_REDUCTIONS,
    compute_cu_seqlens,
    find_document_starts,
    find_loss_indices,
    find_true,
)

# Key of a tensor of shape (L,) -> (dtype, padding value). `_pad` pads input_ids with `pad_id` and counts positions.
TOKEN_TENSORS = {
    "input_ids": (torch.int64, 0),
    "labels": (torch.int64, IGNORE_INDEX),
    "attention_mask": (torch.bool, False),
    "position_ids": (torch.int64, 0),
    "loss_weight": (torch.float32, 0.0),
}
TILE_KEYS = ("pixel_values", "image_flags")
LIST_KEYS = ("documents", "bad_samples")  # read by the trainer, not by the model


def concat_pad_data_collator(features: Sequence[dict], max_item_length: int | None = None, pad_id: int = 0) -> dict:
    """Pad B rows to (B, L) and concatenate their tiles.

    Args:
        features: rows with `input_ids`, `labels`, `position_ids` (L_b,), `pixel_values` (T_b, 3, S, S), `image_flags`
            (T_b,); optionally `attention_mask`, `loss_weight` (L_b,) and the lists `documents` and `bad_samples` of a
            `PackedDataset`. All rows have the keys of the first.
        max_item_length: L, by default the length of the longest row.

    Returns:
        Token tensors (B, L), tile tensors (sum T_b, ...), the lists concatenated, anything else stacked. Strings are
        dropped.

    Raises:
        ValueError: a row is longer than `max_item_length`.
    """
    return _collate(features, pad_id, padded_keys=TOKEN_TENSORS, concatenated_keys=TILE_KEYS, length=max_item_length)


def collate_rows(
    rows: Sequence[dict], pad_id: int = 0, max_item_length: int | None = None, image_token_id: int | None = None
) -> dict:
    """Collate rows for training: `concat_pad_data_collator` plus `compute_indices`."""
    batch = concat_pad_data_collator(rows, max_item_length, pad_id)
    return batch | compute_indices(batch, image_token_id)


def compute_indices(batch: dict, image_token_id: int | None = None) -> dict:
    """Compute what the model would have to ask the device for.

    To read a count or a mask, the CPU waits until the device has done all work so far.

    Args:
        batch: `input_ids`, `labels`, `position_ids` (B, L), `image_flags` (T,).
        image_token_id: id of `<IMG_CONTEXT>`; None leaves the last two to the model.

    Returns:
        `cu_seqlens`: starts of all documents in the flattened rows, then B * L. A list, which stays on the CPU.
        `loss_indices`: (n,), see `find_loss_indices`.
        `image_token_indices`: (m,), the image tokens in the flattened rows.
        `tile_indices`: (t,), the tiles of image flag 1; only if some have the flag 0.
    """
    indices: dict[str, Any] = {
        "cu_seqlens": compute_cu_seqlens(batch["position_ids"]),
        "loss_indices": find_loss_indices(batch["labels"], batch["position_ids"]),
    }
    if image_token_id is not None:
        indices["image_token_indices"] = find_true(batch["input_ids"] == image_token_id)
        is_image = batch["image_flags"] == 1
        if not is_image.all():
            indices["tile_indices"] = find_true(is_image)
    return indices


def copy_to_device(batch: dict, device: torch.device) -> dict:
    """Copy the tensors of a batch to a device.

    From pinned memory the copies run beside the work of the device: the CPU does not wait.
    """
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def move_batch(batch: dict, device: torch.device, mean: Sequence[float], std: Sequence[float]) -> dict:
    """Move a batch to a device, and normalize its tiles there."""
    moved = copy_to_device(batch, device)
    return moved | {"pixel_values": normalize_tiles(moved["pixel_values"], mean, std)}


def pad_data_collator(features: Sequence[dict], pad_id: int = 0) -> dict:
    """Pad `input_ids`, `labels` and `attention_mask` to (B, L); stack everything else."""
    padded_keys = ("input_ids", "labels", "attention_mask")
    return _collate(features, pad_id, padded_keys, concatenated_keys=())


def dpo_concat_pad_data_collator(features: Sequence[dict], pad_id: int = 0) -> dict:
    """Collate the keys `chosen_*` and `rejected_*`, each padded separately."""
    padded_keys = [side + key for side in ("chosen_", "rejected_") for key in TOKEN_TENSORS]
    return _collate(features, pad_id, padded_keys, concatenated_keys=TILE_KEYS)


def _collate(
    features: Sequence[dict],
    pad_id: int,
    padded_keys: Iterable[str],
    concatenated_keys: Iterable[str],
    length: int | None = None,
) -> dict:
    batch: dict[str, Any] = {}
    for key, first_value in features[0].items():
        values = [row[key] for row in features]
        if key in padded_keys:
            batch[key] = _pad(key, values, pad_id, length or max(map(len, values)))
        elif key in concatenated_keys:
            batch[key] = torch.cat([torch.as_tensor(value) for value in values])
        elif key in LIST_KEYS:
            batch[key] = [entry for value in values for entry in value]
        elif not isinstance(first_value, str | None):
            batch[key] = torch.stack([torch.as_tensor(value) for value in values])
    return batch


def _pad(key: str, values: Sequence, pad_id: int, length: int) -> torch.Tensor:
    """Pad (L_b,) each to one tensor (B, length)."""
    key = key.removeprefix("chosen_").removeprefix("rejected_")
    dtype, pad_value = TOKEN_TENSORS[key]
    longest = max(map(len, values))
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit into {length}.")
    padded = torch.full((len(values), length), pad_id if key == "input_ids" else pad_value, dtype=dtype)
    for target, value in zip(padded, values, strict=True):
        target[: len(value)] = torch.as_tensor(value)
        if key == "position_ids":  # padding is one more document
            target[len(value) :] = torch.arange(length - len(value))
    return padded


# -- upstream's packed batches -----------------------------------------------------------------------------------------


def len2weight(x: int, loss_reduction: str) -> float:
    """Return the weight of each of a document's `x` loss tokens."""
    if loss_reduction not in LOSS_REDUCTIONS:
        supported = ", ".join(LOSS_REDUCTIONS)
        raise NotImplementedError(f"loss_reduction {loss_reduction!r} is not supported: expected one of {supported}.")
    return LOSS_REDUCTIONS[loss_reduction](x) if x else 0.0


def packed_collate_fn(
    features: Sequence[dict],
    data_collator: Callable = concat_pad_data_collator,
    len2weight: Callable[[int], float] = lambda n: 1.0,
    max_item_length: int = 0,
    micro_num: int = 1,
    loss_reduction_all_gather: bool = False,
    pad_id: int = 0,
) -> dict:
    """Collate rows to upstream's packed batch, for code that expects it.

    The trainer uses `collate_rows` instead.

    Args:
        features: at most `micro_num` rows. If there are fewer, copies of the first row without loss tokens are added.
        len2weight: number of loss tokens of a document -> weight of each of them.
        max_item_length: L, 0 for the longest row.

    Returns:
        What `data_collator` returns, and:
        `attention_mask`: int32 (micro_num, documents + 1), cumulative document lengths of each row.
        `loss_weight`: nested list (micro_num, L).
        `statistics`: int64 (3,): documents, padding tokens, tiles of image flag 0.
        `loss_reduction_all_gather`: as passed.

    Raises:
        NotImplementedError: more rows than `micro_num`.
        ValueError: rows of different numbers of documents, whose lengths do not form one tensor.
    """
    if len(features) > micro_num:
        raise NotImplementedError(f"{len(features)} rows for a micro-batch of {micro_num}")
    keys = ("input_ids", "labels", "position_ids", "pixel_values", "image_flags")
    rows = [{key: torch.as_tensor(row[key]) for key in keys} for row in features]
    # Upstream expects full micro-batches; the copies have no effect on the loss.
    row_without_loss = rows[0] | {"labels": torch.full_like(rows[0]["labels"], IGNORE_INDEX)}
    rows += [row_without_loss] * (micro_num - len(rows))
    lengths = [len(row["input_ids"]) for row in rows]
    padded_length = max_item_length or max(lengths)

    cu_seqlens = [_compute_padded_cu_seqlens(row, padded_length) for row in rows]
    if len({len(row) for row in cu_seqlens}) > 1:
        nums_documents = ", ".join(str(len(row) - 1) for row in cu_seqlens)
        raise ValueError(f"rows of {nums_documents} documents do not fit into one tensor")
    num_documents = sum(int((row["position_ids"] == 0).sum()) for row in rows[: len(features)])
    num_padding = len(rows) * padded_length - sum(lengths)
    num_blank_tiles = sum(int((row["image_flags"] == 0).sum()) for row in rows)
    return data_collator(rows, max_item_length=padded_length, pad_id=pad_id) | {
        "attention_mask": torch.tensor(cu_seqlens, dtype=torch.int32),
        "loss_weight": [_compute_loss_weights(row, len2weight, padded_length) for row in rows],
        "loss_reduction_all_gather": loss_reduction_all_gather,
        "statistics": torch.tensor([num_documents, num_padding, num_blank_tiles]),
    }


def _compute_padded_cu_seqlens(row: dict, padded_length: int) -> list[int]:
    """Compute the cumulative document lengths of one row, padding included."""
    cu_seqlens = compute_cu_seqlens(row["position_ids"][None])
    return cu_seqlens + [padded_length] if cu_seqlens[-1] < padded_length else cu_seqlens


def _compute_loss_weights(row: dict, len2weight: Callable[[int], float], padded_length: int) -> list[float]:
    """Compute the weight of each token of one row; 0 without loss."""
    has_loss = row["labels"] != IGNORE_INDEX  # (L,)
    document_ids = find_document_starts(row["position_ids"][None])[0].cumsum(0) - 1  # (L,)
    num_loss_tokens = torch.bincount(document_ids, has_loss.float())[document_ids]  # (L,) of the token's document
    weights = [
        len2weight(int(count)) if has_loss_i else 0.0
        for count, has_loss_i in zip(num_loss_tokens.tolist(), has_loss.tolist(), strict=True)
    ]
    return weights + [0.0] * (padded_length - len(weights))
