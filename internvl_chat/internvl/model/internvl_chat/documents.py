"""Where the documents of a packed row begin, which positions carry loss, and how much each label weighs.

`position_ids` restart at 0 for each document. That is the only mark of a boundary.
"""

import torch

IGNORE_INDEX = -100  # label of a token without loss


def document_begins(position_ids: torch.Tensor) -> torch.Tensor:
    """Boolean (B, L): a document begins at every position 0, and with every row."""
    begins = position_ids == 0
    begins[:, 0] = True
    return begins


def document_bounds(position_ids: torch.Tensor) -> list[int]:
    """Where documents begin in B rows laid end to end, and the number of all tokens: (B, L) -> [0, ..., B L]."""
    return [*document_begins(position_ids).flatten().nonzero().flatten().tolist(), position_ids.numel()]


# --loss_reduction -> weight of each of the n trained tokens of a document.
REDUCTIONS = {
    "token": lambda n: n**0.0,
    "sample": lambda n: 1 / n,
    "square": lambda n: n**-0.5,
}


def document_weights(labels: torch.Tensor, position_ids: torch.Tensor, reduction: str) -> torch.Tensor:
    """Weight (B, L), float32, of each label by the number of labels of its document, which begins at position 0."""
    document = document_begins(position_ids).flatten().cumsum(0) - 1
    counted = (labels != IGNORE_INDEX).flatten().float()
    counts = torch.zeros_like(counted).scatter_add(0, document, counted)[document]
    return (REDUCTIONS[reduction](counts.clamp(min=1)) * counted).view_as(labels)


def loss_positions(labels: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Boolean (B, L - 1): whether position i is trained to predict label i + 1 (never across two documents)."""
    trained = labels[:, 1:] != IGNORE_INDEX
    return trained if position_ids is None else trained & (position_ids[:, 1:] != 0)
