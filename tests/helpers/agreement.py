"""Compare two training runs: losses, gradient norms, trained tensors."""

from pathlib import Path

import torch
from helpers.training_runs import load_weights, read_step_logs

from internvl.constants import IMG_CONTEXT_TOKEN
from internvl.model.internvl_chat import InternVLChatModel


def assert_runs_agree(run: Path, other: Path, tensors: float = 1e-5, loss: float = 1e-6, norm: float = 1e-5) -> None:
    """Assert that two runs agree within relative tolerances.

    Args:
        run, other: output folders of the runs; `other` is the reference.
        tensors: for all tensors that differ, taken as one vector; a single tensor may differ by 10 times as much,
            because AdamW moves a number whose gradient is almost zero as far as any other.
        loss: for the loss of each step.
        norm: for the gradient norm of each step.
    """
    for key, allowed in {"loss": loss, "grad_norm": norm}.items():
        ours, theirs = ([step[key] for step in read_step_logs(output)] for output in (run, other))
        torch.testing.assert_close(ours, theirs, rtol=allowed, atol=0, msg=lambda text, key=key: f"{key}: {text}")
    ours, theirs = drop_key_biases(load_weights(run)), drop_key_biases(load_weights(other))
    assert ours.keys() == theirs.keys()
    differing = [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)]
    distances = {name: relative_distance(ours[name], theirs[name]) for name in differing}
    too_far = {name: distance for name, distance in distances.items() if distance > 10 * tensors}
    assert not too_far, too_far
    if differing:
        vector, reference = (
            torch.cat([state[name].float().flatten() for name in differing]) for state in (ours, theirs)
        )
        assert relative_distance(vector, reference) <= tensors


def drop_key_biases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out the key biases of the vision encoder.

    They shift all logits of a softmax alike, so their gradients are nothing but rounding.
    """
    qkv = {name: tensor.view(3, -1) for name, tensor in tensors.items() if name.endswith("attn.qkv.bias")}
    return tensors | {name: bias[[0, 2]] for name, bias in qkv.items()}


def relative_distance(tensor: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the reference."""
    return ((tensor.float() - reference.float()).norm() / reference.float().norm().clamp(min=1e-12)).item()


def assert_trained(run: Path, base: Path, least: float = 1e-3) -> None:
    """Assert that a run trained some tensors and left the others bit-identical.

    A full tensor that differs from the base must differ by more than `least` of its norm; every adapter's B matrix,
    which starts at zero, must be nonzero.
    """
    before, num_trained = load_weights(base), 0
    for name, tensor in load_weights(run).items():
        base_name = name.replace("base_model.model.", "").replace("base_layer.", "")  # as it is called without PEFT
        if base_name in before and not torch.equal(tensor, before[base_name]):
            assert relative_distance(tensor, before[base_name]) > least, name
            num_trained += 1
        elif ".lora_B." in name:
            assert tensor.any(), name
            num_trained += 1
    assert num_trained


def make_probe(tokenizer, num_image_token: int) -> dict[str, torch.Tensor]:
    """Make the inputs of a fixed question about one random tile."""
    prompt = IMG_CONTEXT_TOKEN * num_image_token + "What is it?"
    return {
        "pixel_values": torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)),
        "input_ids": tokenizer(prompt, return_tensors="pt").input_ids,
    }


def compute_probe_logits(model: InternVLChatModel, tokenizer) -> torch.Tensor:
    """Compute the logits (1, L, V) of a fixed question, without dropout."""
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    with torch.no_grad():
        return model.eval()(**make_probe(tokenizer, model.num_image_token)).logits
