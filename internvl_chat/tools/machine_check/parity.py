"""Compare a tiny model on the device with the same model on the CPU in float32.

The model has LoRA in vision encoder and LLM, and a packed row with several documents and tiles. Compared are the loss
and the gradients of all adapters. Without a GPU, the device is the CPU itself.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from internvl.data.collators import collate_rows
from internvl.model.activation_checkpointing import apply_gradient_checkpointing
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.liger_kernels import use_liger_kernels
from internvl.model.lora import unwrap_peft
from internvl.tools.benchmark.sizes import MODEL_SIZES, ModelSize

from .checks import Checks, SkippedCheck
from .models import build_adapted_model, build_row, move_batch

DOCUMENTS = [(28, 3), (9, 0), (46, 6), (23, 0), (50, 2), (5, 1)]  # (text tokens, tiles) of the row
OBSERVED_DOCUMENT = 2  # its loss must depend on no other document
# Layouts of the LLM: most models of transformers, and that of InternVL2 and 2.5 with its fused QKV.
LLMS: dict[str, dict] = {"Qwen2": {}, "InternLM2": {"architectures": ["InternLM2ForCausalLM"], "bias": False}}


class Precision(NamedTuple):
    """Data types of base weights and adapters; autocast runs in that of the base."""

    base: torch.dtype
    adapters: torch.dtype


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "autocast": Precision(torch.bfloat16, torch.float32),  # without DeepSpeed, or with --lora_fp32
    "bf16": Precision(torch.bfloat16, torch.bfloat16),  # as DeepSpeed casts
}
# Largest relative errors of loss and gradients. fp32 rounds by 6e-8, sums in another order give 1e-6. bf16 rounds by
# 4e-3; on CPUs the errors over all layers are at most 1e-4 (loss) and 1.5e-2 (gradients). For comparison: one missing
# boundary of documents, or attention scores that are 25 % too large, change the gradients by 0.15 to 0.3.
ERROR_LIMITS = {"fp32": (1e-5, 1e-4), "autocast": (2e-3, 5e-2), "bf16": (2e-3, 5e-2)}

Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]  # loss, gradients by name


def list_parity_checks(device: torch.device, limits: Mapping[str, tuple[float, float]] = ERROR_LIMITS) -> Checks:
    """List the comparisons for each layout of the LLM.

    Args:
        limits: precision -> largest relative error of the loss, and of the gradients.
    """
    with disable_tf32():
        for llm, fields in LLMS.items():
            size = MODEL_SIZES["test"]._replace(llm=MODEL_SIZES["test"].llm | fields, rank=4)
            model, batch = build_sensitive_model(size), build_row(size, DOCUMENTS)
            reference = compute_outcome(model, batch, torch.device("cpu"), "fp32")
            compare = partial(compare_with_reference, reference, limits, model, batch, device)
            for precision in PRECISIONS:
                yield f"{llm}, {precision}", partial(compare, precision)
            yield f"{llm}, documents apart", partial(check_documents_apart, model, batch, device)
            yield f"{llm}, gradient checkpointing", partial(check_recomputation, size, batch, device, limits)
            yield f"{llm}, Liger", partial(check_liger, compare)


@contextmanager
def disable_tf32() -> Iterator[None]:
    """Compute in float32 as it is, without TF32.

    torch's default for convolutions is TF32, and NVIDIA's containers enable it for matrix products, too. Its rounding
    would hide errors.
    """
    if hasattr(torch.backends, "fp32_precision"):  # torch >= 2.9
        # pyrefly: ignore[missing-attribute]  # torch replaces the module by an object with `conv`
        settings, name, exact = [torch.backends.cudnn.conv, torch.backends.cuda.matmul], "fp32_precision", "ieee"
    else:
        settings, name, exact = [torch.backends.cudnn, torch.backends.cuda.matmul], "allow_tf32", False
    before = [getattr(backend, name) for backend in settings]
    for backend in settings:
        setattr(backend, name, exact)
    try:
        yield
    finally:
        for backend, value in zip(settings, before, strict=True):
            setattr(backend, name, value)


# -- model and its outcome ---------------------------------------------------------------------------------------------


def build_sensitive_model(size: ModelSize, dropout: float = 0.0) -> InternVLChatModel:
    """Build a model on the CPU whose adapters and activations are far from zero.

    A matrix halves the scale of its input. With the usual initial weights, most of the LLM would have no effect on the
    loss; with larger ones, attention saturates and multiplies rounding errors. All weights are numbers of bf16.
    """
    model = build_adapted_model(size, dropout)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 * parameter[0].numel() ** -0.5, generator=generator)
            parameter.copy_(parameter.bfloat16())
    return model


def place_model(model: InternVLChatModel, device: torch.device, precision: str) -> InternVLChatModel:
    """Copy a model to a device, in a precision."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        dtype = PRECISIONS[precision].adapters if parameter.requires_grad else PRECISIONS[precision].base
        parameter.data = parameter.data.to(device, dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)  # in its own data type
    return model


def compute_loss(model: InternVLChatModel, batch: dict, device: torch.device, precision: str) -> torch.Tensor:
    """Compute the loss of a batch in a precision."""
    base, adapters = PRECISIONS[precision]
    with torch.autocast(device.type, base, enabled=base != adapters):
        return model(**move_batch(batch, device, base)).loss


def compute_outcome(
    model: InternVLChatModel,
    batch: dict,
    device: torch.device,
    precision: str,
    change_fn: Callable[[InternVLChatModel], Any] = lambda model: None,
) -> Outcome:
    """Compute loss and gradients of a copy of the model.

    Args:
        change_fn: called with the copy on the device.
    """
    model = place_model(model, device, precision)
    change_fn(model)
    torch.manual_seed(2)  # of dropout
    loss = compute_loss(model, batch, device, precision)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- checks ------------------------------------------------------------------------------------------------------------


def compare_with_reference(
    reference: Outcome,
    limits: Mapping[str, tuple[float, float]],
    model: InternVLChatModel,
    batch: dict,
    device: torch.device,
    precision: str,
    change_fn: Callable[[InternVLChatModel], Any] = lambda model: None,
) -> dict[str, float]:
    """Compare the outcome on the device with that on the CPU in float32."""
    return require_equal(compute_outcome(model, batch, device, precision, change_fn), reference, *limits[precision])


def require_equal(found: Outcome, wanted: Outcome, max_loss_error: float, max_gradient_error: float) -> dict:
    """Return the relative errors of loss and gradients.

    The error of gradients is the norm of the difference by the norm, over all adapters together.

    Raises:
        ValueError: an error is above its limit, or other parameters have gradients.
    """
    if found[1].keys() != wanted[1].keys():
        raise ValueError(f"{len(found[1])} parameters have gradients, expected {len(wanted[1])}")
    errors = {
        "loss_error": compute_relative_error(found[0], wanted[0]),
        "gradient_error": compute_relative_error(*(join_tensors(outcome[1]) for outcome in (found, wanted))),
    }
    limits = {"loss_error": max_loss_error, "gradient_error": max_gradient_error}
    for name, error in errors.items():
        if not error <= limits[name]:  # also for NaN
            raise ValueError(f"{name} {error:.2e} exceeds the limit {limits[name]:.0e} (all: {format_errors(errors)})")
    return errors


def format_errors(errors: Mapping[str, float]) -> str:
    """Format errors as `name value, ...`."""
    return ", ".join(f"{name} {error:.2e}" for name, error in errors.items())


def compute_relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Compute ||found - wanted|| / ||wanted|| in float64."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def join_tensors(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Join tensors to one vector, in the order of their names."""
    return torch.cat([tensors[name].double().cpu().flatten() for name in sorted(tensors)])


def check_documents_apart(model: InternVLChatModel, batch: dict, device: torch.device) -> dict:
    """Check that the loss of a document has no gradient in others, in every precision.

    Raises:
        ValueError: a token of another document has a gradient, or none of its own has.
    """
    start, end = batch["cu_seqlens"][OBSERVED_DOCUMENT : OBSERVED_DOCUMENT + 2]
    row = build_row_with_loss_in(batch, start, end)
    for precision in PRECISIONS:
        placed, embeddings = place_model(model, device, precision), []

        def keep_embeddings(module, args, kwargs, kept=embeddings):
            kwargs["inputs_embeds"].retain_grad()
            kept.append(kwargs["inputs_embeds"])

        decoder = unwrap_peft(placed.language_model).model
        decoder.register_forward_pre_hook(keep_embeddings, with_kwargs=True)
        compute_loss(placed, row, device, precision).backward()
        has_gradient = embeddings[0].grad.flatten(0, 1).any(dim=1)
        if not has_gradient[start:end].any():
            raise ValueError(f"{precision}: the loss of a document has no gradient in its own tokens")
        if num_others := int(has_gradient.sum() - has_gradient[start:end].sum()):
            raise ValueError(f"{precision}: the loss of a document depends on {num_others} tokens of other documents")
    return {"documents": len(batch["cu_seqlens"]) - 1, "precisions": ", ".join(PRECISIONS)}


def build_row_with_loss_in(batch: dict, start: int, end: int) -> dict:
    """Collate a row again, with loss tokens in [start, end) only."""
    row = {key: batch[key][0] for key in ("input_ids", "labels", "position_ids")}
    is_inside = torch.zeros(len(row["labels"]), dtype=torch.bool)
    is_inside[start:end] = True
    row["labels"] = row["labels"].masked_fill(~is_inside, -100)
    return collate_rows([row | {key: batch[key] for key in ("pixel_values", "image_flags")}])


def check_recomputation(size: ModelSize, batch: dict, device: torch.device, limits: Mapping) -> dict[str, float]:
    """Check that gradient checkpointing changes nothing, with dropout in the adapters."""
    model = build_sensitive_model(size, dropout=0.1)

    def compare(precision: str) -> dict[str, float]:
        plain, recomputed = (
            compute_outcome(model, batch, device, precision, change_fn)
            for change_fn in (lambda model: None, recompute_all_layers)
        )
        return require_equal(recomputed, plain, *limits[precision])

    return collect_errors(compare)


def recompute_all_layers(model: InternVLChatModel) -> None:
    """Turn gradient checkpointing on in every layer."""
    apply_gradient_checkpointing(model.vision_model)
    apply_gradient_checkpointing(model.language_model)


def check_liger(compare_fn: Callable[..., dict[str, float]]) -> dict[str, float]:
    """Compare a model with Liger's kernels with the reference, or skip the check."""
    return collect_errors(partial(compare_fn, change_fn=apply_liger))


def apply_liger(model: InternVLChatModel) -> None:
    """Replace layers by Liger's kernels.

    Raises:
        SkippedCheck: they cannot run here.
    """
    try:
        use_liger_kernels(model)
    except ValueError as error:
        raise SkippedCheck(str(error)) from None


def collect_errors(compare_fn: Callable[[str], dict[str, float]]) -> dict[str, float]:
    """Compare in fp32 and in bf16 and put the precision before the names of the errors."""
    errors = {precision: compare_fn(precision) for precision in ("fp32", "bf16")}
    return {f"{precision} {name}": error for precision, found in errors.items() for name, error in found.items()}
