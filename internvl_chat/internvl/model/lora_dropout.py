"""Dropout that draws random numbers for dropped elements only.

On a CPU, `nn.Dropout` spends more time on drawing one random number for each element than the layers around it. Here a
random number of indices is drawn: `n` uniform indices with repetition, `n` Poisson distributed. Then the number of
times that each index occurs is Poisson distributed, too, and independent of the other indices (Kingman, Poisson
Processes, 1993). So elements are dropped independently, as `nn.Dropout` does it.
"""

import math

import torch
from torch import nn


def apply_dropout(x: torch.Tensor, dropout: nn.Module) -> torch.Tensor:
    """Apply `dropout`, on a CPU by sampling only the dropped elements.

    The distribution is that of `nn.Dropout`; the random numbers are others.
    """
    # At a rate of 0.5 there are 0.69 draws for each element, at 0.64 there is more than one.
    is_sparse = type(dropout) is nn.Dropout and dropout.training and 0 < dropout.p <= 0.5 and x.is_contiguous()
    # The loss calls the LM head once on no tokens.
    if not is_sparse or not x.numel() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return dropout(x)
    return _SparseDropout.apply(x, dropout.p)


def sample_dropped_indices(num_elements: int, rate: float) -> torch.Tensor:
    """Draw the indices of dropped elements.

    int64, unordered, possibly with duplicates.
    """
    # An index is not drawn with probability exp(-mean / num_elements) = 1 - rate.
    mean = -num_elements * math.log1p(-rate)
    num_draws = torch.poisson(torch.tensor(mean, dtype=torch.float64))
    return torch.randint(num_elements, (int(num_draws),))


class _SparseDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, rate: float) -> torch.Tensor:
        indices = sample_dropped_indices(x.numel(), rate)
        ctx.rate = rate
        ctx.save_for_backward(indices)
        return _scale_and_zero(x, indices, rate)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        (dropped,) = ctx.saved_tensors
        return _scale_and_zero(gradient.contiguous(), dropped, ctx.rate), None


def _scale_and_zero(x: torch.Tensor, indices: torch.Tensor, rate: float) -> torch.Tensor:
    scaled = x * (1 / (1 - rate))
    scaled.view(-1).index_fill_(0, indices, 0)
    return scaled
