"""Whether two runs agree: losses, gradient norms and what they trained, to the rounding of float32 or as it is said."""

from pathlib import Path

import torch
from helpers.training_runs import history, weights


def check_agreement(run: Path, other: Path, tensors: float = 1e-5, loss: float = 1e-6, norm: float = 1e-5) -> None:
    """All tensors that differ do so by at most `tensors` of their norm together, each by 10 times as much of its own:
    AdamW moves a number with a gradient near zero as far as any other. Losses by `loss`, gradient norms by `norm`."""
    for key, allowed in {"loss": loss, "grad_norm": norm}.items():
        ours, theirs = ([step[key] for step in history(output)] for output in (run, other))
        torch.testing.assert_close(ours, theirs, rtol=allowed, atol=0, msg=lambda text, key=key: f"{key}: {text}")
    ours, theirs = settled(weights(run)), settled(weights(other))
    assert ours.keys() == theirs.keys()
    differ = [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)]
    assert not (apart := {name: d for name in differ if (d := distance(ours[name], theirs[name])) > 10 * tensors}), (
        apart
    )
    if differ:
        one, two = (torch.cat([states[name].float().flatten() for name in differ]) for states in (ours, theirs))
        assert distance(one, two) <= tensors


def settled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the biases of keys in the vision encoder: a softmax does not feel them, their gradients are rounding."""
    keys = {name: tensor.view(3, -1) for name, tensor in tensors.items() if name.endswith("attn.qkv.bias")}
    return tensors | {name: bias[[0, 2]] for name, bias in keys.items()}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two tensors, over the norm of the second."""
    return ((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-12)).item()


def check_trained(run: Path, base: Path, least: float = 1e-3) -> None:
    """Some tensors moved, by `least` of their norm or more; adapters away from zero; the others not by a bit."""
    before, moved = weights(base), 0
    for name, tensor in weights(run).items():
        plain = name.replace("base_model.model.", "").replace("base_layer.", "")
        if plain in before and not torch.equal(tensor, before[plain]):
            assert distance(tensor, before[plain]) > least, name
            moved += 1
        elif ".lora_B." in name:
            assert tensor.any(), name
            moved += 1
    assert moved
