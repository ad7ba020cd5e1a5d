"""Documents of a packed row: boundaries, loss mask, label weights.

`position_ids` (B, L) restart at 0 for each document. This is the only mark of a boundary.
"""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100  # label of a token without loss; the small patch cannot import internvl.constants


def find_document_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """Return a boolean mask (B, L) of the first tokens of documents.

    A document starts at each position 0, and with each row.
    """
    starts = position_ids == 0
    starts[:, 0] = True
    return starts


def compute_cu_seqlens(position_ids: torch.Tensor) -> list[int]:
    """Compute cumulative document lengths over the flattened rows.

    (B, L) -> [0, ..., B * L].
    """
    return [*find_document_starts(position_ids).flatten().nonzero().flatten().tolist(), position_ids.numel()]


def normalize_document_boundaries(
    attention_mask: torch.Tensor | None, cu_seqlens: list[int] | torch.Tensor | None
) -> tuple[torch.Tensor | None, list[int] | None]:
    """Convert the forms in which callers mark documents to one.

    - A mask (B, L) of int64 or bool, for padding: one document a row.
    - Upstream's packed batches have cumulative lengths in `attention_mask`, which then is int32.
    - InternVL 3.5's packed batches have a tensor `cu_seqlens` beside an unused mask.
    - The collators here have a list `cu_seqlens`.

    In all packed batches `position_ids` restart for each document, so the lengths can be computed from these. A list of
    lengths saves that.

    Returns:
        The mask for padding (None for packed batches), and the list of lengths (None if the caller gave no list).
    """
    is_packed = cu_seqlens is not None or (attention_mask is not None and attention_mask.dtype == torch.int32)
    return None if is_packed else attention_mask, cu_seqlens if isinstance(cu_seqlens, list) else None


# --loss_reduction -> weight of each of the n loss tokens of a document.
LOSS_REDUCTIONS = {
    "token": lambda n: n**0.0,
    "sample": lambda n: 1 / n,
    "square": lambda n: n**-0.5,
}


def compute_label_weights(labels: torch.Tensor, position_ids: torch.Tensor, reduction: str) -> torch.Tensor:
    """Compute the weight of each label, (B, L) float32.

    It depends on the number of labels in the document, see `LOSS_REDUCTIONS`.
    """
    document_ids = find_document_starts(position_ids).flatten().cumsum(0) - 1  # (B * L,)
    has_loss = (labels != IGNORE_INDEX).flatten().float()
    num_labels = torch.zeros_like(has_loss).scatter_add(0, document_ids, has_loss)[document_ids]
    return (LOSS_REDUCTIONS[reduction](num_labels.clamp(min=1)) * has_loss).view_as(labels)


def get_loss_mask(labels: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Return a boolean mask (B, L - 1) of the loss tokens.

    It is True where token i has a loss for label i + 1. The last token of a document has none: the next token belongs
    to another document.
    """
    has_loss = labels[:, 1:] != IGNORE_INDEX
    return has_loss if position_ids is None else has_loss & (position_ids[:, 1:] != 0)


def find_loss_indices(labels: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Find the tokens whose states predict a loss token, (n,) in the flattened rows.

    The label of index i is that of token i + 1. On a GPU this waits for the device.
    """
    return find_true(F.pad(get_loss_mask(labels, position_ids), (0, 1)))


def find_true(mask: torch.Tensor) -> torch.Tensor:
    """Return the indices (n,) of True in a flattened mask.

    On a GPU this waits for the device.
    """
    return mask.flatten().nonzero().flatten()


def select_loss_tokens(
    states: torch.Tensor, labels: torch.Tensor, loss_indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the states and the labels of loss tokens.

    (B, L, C) and (B, L) -> (n, C) and (n,).
    """
    return states.flatten(0, 1).index_select(0, loss_indices), labels.flatten()[loss_indices + 1]
