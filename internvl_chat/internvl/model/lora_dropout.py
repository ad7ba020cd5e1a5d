"""Dropout for CPUs, which spend more time on a random number for each element than on the layers around it.

Used by `lora_linear.py`. Random numbers are drawn for dropped elements only: darts are thrown at all elements, so many
that each is hit with the probability `rate`. Where the number of darts is a Poisson variable, those that hit one
element are so many whatever hits the others (Kingman, Poisson Processes, 1993): elements are dropped independently.
"""

import math

import torch
from torch import nn


def drop(x: torch.Tensor, dropout: nn.Module) -> torch.Tensor:
    """What `dropout(x)` gives, or, for `nn.Dropout` on a CPU, something of the same distribution."""
    sparse = type(dropout) is nn.Dropout and dropout.training and 0 < dropout.p <= 0.5 and x.is_contiguous()
    if not sparse or x.device.type != "cpu" or torch.compiler.is_compiling():
        return dropout(x)
    return _Dropped.apply(x, dropout.p)


def dropped_places(count: int, rate: float) -> torch.Tensor:
    """Which of `count` elements are dropped: their numbers, in no order, some more than once; int64."""
    # No dart hits an element with probability exp(-darts / count) = 1 - rate.
    darts = torch.poisson(torch.tensor(-count * math.log1p(-rate), dtype=torch.float64))
    return torch.randint(count, (int(darts),))


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, rate: float) -> torch.Tensor:
        places = dropped_places(x.numel(), rate)
        ctx.rate = rate
        ctx.save_for_backward(places)
        return _without(x, places, rate)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        return _without(gradient.contiguous(), *ctx.saved_tensors, ctx.rate), None


def _without(x: torch.Tensor, places: torch.Tensor, rate: float) -> torch.Tensor:
    scaled = x * (1 / (1 - rate))
    scaled.view(-1).index_fill_(0, places, 0)
    return scaled
