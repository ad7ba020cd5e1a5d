"""Dropout for CPUs, which spend more time on a random number for each element than on the layers around it.

Used by `lora_linear.py`. Drawn are the distances from one dropped element to the next, of which there are few: they are
geometric, so that every element is dropped with the same probability, whatever becomes of the others.
"""

import math

import torch
from torch import nn


def drop(x: torch.Tensor, dropout: nn.Module) -> torch.Tensor:
    """What `dropout(x)` gives, or, for `nn.Dropout` on a CPU, something of the same distribution."""
    sparse = type(dropout) is nn.Dropout and dropout.training and 0 < dropout.p <= 0.25 and x.is_contiguous()
    if not sparse or x.device.type != "cpu" or torch.compiler.is_compiling():
        return dropout(x)
    return _Dropped.apply(x, dropout.p)


def dropped_places(count: int, rate: float) -> torch.Tensor:
    """Which of `count` elements are dropped: their numbers, ascending, int64."""
    enough = int(count * rate + 8 * math.sqrt(count * rate)) + 16
    places = torch.empty(0, dtype=torch.int64)
    while not len(places) or places[-1] < count:  # more than once in about 10 ** 14 times
        # What an exponential variable of this rate is rounded down to is geometric.
        distances = torch.empty(enough).exponential_(-math.log1p(-rate)).floor_().long() + 1
        last = places[-1] if len(places) else -1
        places = torch.cat([places, last + distances.cumsum(0)])
    return places[: int(torch.searchsorted(places, count))]


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
