"""Check after the first step that every trainable parameter got a finite gradient."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn


def watch_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Callable[..., None]:
    """Look at the gradients of the steps to come, until the returned function is called.

    That function raises a ValueError that names the trainable tensors which got no gradient, or, unless it is called
    with `finite=False`, one that is not finite.
    Works on hooks, so that it sees gradients that DeepSpeed reduces and frees at once.
    """
    found: dict[str, torch.Tensor] = {}

    def note(name: str, gradient: torch.Tensor) -> None:
        found[name] = torch.isfinite(gradient).all() & found.get(name, True)

    watched = {name: p.register_hook(partial(note, name)) for name, p in named_parameters if p.requires_grad}

    def check(finite: bool = True) -> None:
        for handle in watched.values():
            handle.remove()
        raise_gradient_error("got no gradient", [name for name in watched if name not in found], len(watched))
        if finite:
            raise_gradient_error(
                "got a gradient that is not finite", [n for n, ok in found.items() if not ok], len(watched)
            )

    return check


def raise_gradient_error(what: str, names: list[str], total: int) -> None:
    if names:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"after the first step {len(names)} of {total} trainable tensors {what}: {listed}")
