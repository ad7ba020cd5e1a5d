"""Check the gradients of the first step."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn


def watch_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Callable[..., None]:
    """Watch the gradients of trainable parameters until the returned function is called.

    It uses hooks, because DeepSpeed reduces and frees gradients during the backward pass.

    Returns:
        `check_gradients(finite=True)`, which removes the hooks. It raises a ValueError that names the parameters
        without a gradient or, with `finite`, with a non-finite one.
    """
    watched = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
    received: set[str] = set()
    is_finite: dict[str, torch.Tensor] = {}  # parameter name -> whether all its gradients so far were finite, on device

    def record_finite(name: str, gradient: torch.Tensor) -> None:
        is_finite[name] = torch.isfinite(gradient).all() & is_finite.get(name, True)

    def record_received(name: str, parameter: nn.Parameter) -> None:
        received.add(name)

    # In recomputed layers under ZeRO-3, torch 2.6 and 2.9 call only hooks of the second kind. These cannot read the
    # gradient, which DeepSpeed may have moved to another attribute.
    handles = [p.register_hook(partial(record_finite, name)) for name, p in watched.items()]
    handles += [p.register_post_accumulate_grad_hook(partial(record_received, name)) for name, p in watched.items()]

    def check_gradients(finite: bool = True) -> None:
        for handle in handles:
            handle.remove()
        raise_gradient_error("no gradient", [name for name in watched if name not in received], len(watched))
        if finite and is_finite:
            flags = torch.stack(list(is_finite.values())).tolist()  # one copy, for which the CPU waits
            non_finite = [name for name, ok in zip(is_finite, flags, strict=True) if not ok]
            raise_gradient_error("a non-finite gradient", non_finite, len(watched))

    return check_gradients


def raise_gradient_error(problem: str, names: list[str], total: int) -> None:
    """Raise a ValueError if any parameter got such a gradient."""
    if names:
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"{len(names)} of {total} trainable parameters got {problem} in the first step: {listed}")
