"""Estimate the GPU memory of a training step, without a GPU and without memory.

The real model runs a forward and a backward pass on fake tensors, which have shapes and no data. `MemoryTracker` adds
up the storages that are alive. What depends on the number of ranks (weights, gradients, optimizer states, buffers of
DeepSpeed) is computed from the parameters.

Not contained: fragmentation, workspaces inside of kernels (attention's backward pass, cuBLAS), the loading of a
checkpoint. The CUDA context is assumed. Fake tensors are those of the CPU, because torch (2.6 to 2.14) cannot run a
backward pass on fake CUDA tensors without a GPU. Dropout and RMS norms, which are one kernel on CUDA, are replaced by
ones that take as much memory as those.
"""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from internvl.model.internlm2.modeling_internlm2 import InternLM2RMSNorm
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.model.internvl_chat.modeling_intern_vit import InternRMSNorm
from internvl.model.lora import unwrap_peft

GIB = 2**30
ALLOCATION_UNIT = 512  # bytes, to which torch's CUDA allocator rounds up
CONTEXT_BYTES = int(1.5 * GIB)  # assumed: CUDA context, workspaces of cuBLAS, buffers of NCCL
HAS_FUSED_RMS_NORM = hasattr(torch.ops.aten, "_fused_rms_norm")  # from torch 2.9 on
# NF4 with quantized scales: half a byte, a byte of scale for 64 weights, 4 bytes for 256 scales.
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


class Row(NamedTuple):
    """Size of one packed row, or of one padded sample."""

    tokens: int
    tiles: int


class StepMemory(NamedTuple):
    """Bytes of a forward and backward pass beyond weights and gradients.

    `kept` are alive between both passes, `peak` at the highest point.
    """

    kept: int
    peak: int


class MemoryEstimate(NamedTuple):
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    context: int = CONTEXT_BYTES

    @property
    def total(self) -> int:
        return sum(self)


# -- activations -------------------------------------------------------------------------------------------------------


class MemoryTracker(TorchDispatchMode):
    """Add up the bytes of all storages that operators create, until they are freed.

    Works on real and fake tensors.

    Attributes:
        live, peak: bytes; those of the tensors given to `ignore` do not count.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}  # storage -> bytes

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count these tensors, whose views operators may return."""
        for tensor in tensors:
            self._add(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, results)
        return results

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._sizes:
            self._add(storage, -(-storage.nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT)

    def _add(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = id(storage)  # the Python object lives as long as the storage
        self._sizes[key] = num_bytes
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key)  # called when the last tensor or graph node lets go of it

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def measure_step(model: nn.Module, batch: dict[str, Any], autocast_dtype: torch.dtype | None = None) -> StepMemory:
    """Run a forward and a backward pass and measure their memory.

    Gradients of parameters are freed as soon as they are complete.
    """
    inputs = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    with MemoryTracker() as tracker:
        tracker.ignore([*model.parameters(), *model.buffers(), *inputs])
        with torch.autocast(inputs[0].device.type, autocast_dtype, enabled=autocast_dtype is not None):
            loss = model(**batch).loss
        kept = tracker.live
        loss.backward()
    for hook in hooks:
        hook.remove()
    return StepMemory(kept, tracker.peak)


def trace_step(
    model: InternVLChatModel, row: Row, num_rows: int = 1, autocast_dtype: torch.dtype | None = None
) -> StepMemory:
    """Measure a training step on fake tensors.

    Args:
        model: on the meta device, prepared for training. It cannot be used afterwards.
        num_rows: of a micro-batch. They are one document, of image tokens and loss tokens: memory does not depend on
            the number of documents.
    """
    with FakeTensorMode():
        replace_by_fake_tensors(model)
        model.img_context_token_id = 0
        use_fused_kernels(model)
        model.train()
        batch = build_fake_batch(model, row, num_rows)
        inputs = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
        memory = measure_step(model, batch, autocast_dtype)
    return StepMemory(memory.kept + inputs, memory.peak + inputs)


def replace_by_fake_tensors(model: nn.Module) -> None:
    """Replace parameters and buffers by tensors of the current fake mode.

    Tied parameters stay tied.
    """
    fakes: dict[int, torch.Tensor] = {}
    for module in list(model.modules()):
        tied = {"remove_duplicate": False, "recurse": False}
        for name, tensor in [*module.named_parameters(**tied), *module.named_buffers(**tied)]:
            if id(tensor) not in fakes:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
            setattr(module, name, fakes[id(tensor)])


class FusedDropout(nn.Dropout):
    """Dropout with a mask of one byte per element, as CUDA's kernel has it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(input, self.p, self.training)[0]


class FusedRmsNorm(nn.Module):
    """An RMS norm without values, which keeps what CUDA's kernel keeps."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FakeRmsNorm.apply(x, self.weight)


class _FakeRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def use_fused_kernels(model: nn.Module) -> None:
    """Replace modules that are one kernel on CUDA and several on a CPU."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, FusedDropout(child.p))
            elif isinstance(child, (InternRMSNorm, InternLM2RMSNorm)) and HAS_FUSED_RMS_NORM:
                setattr(module, name, FusedRmsNorm(child.weight))


def build_fake_batch(model: InternVLChatModel, row: Row, num_rows: int) -> dict[str, Any]:
    """Build a collated batch of one document, with the indices that collators compute."""
    num_tokens, num_tiles = row.tokens * num_rows, row.tiles * num_rows
    num_image_tokens = num_tiles * count_image_tokens(model.config)
    image_size = model.config.force_image_size or model.config.vision_config.image_size
    ids = torch.zeros(num_rows, row.tokens, dtype=torch.long)
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": ids.clone(),
        "pixel_values": torch.zeros(num_tiles, 3, image_size, image_size, dtype=torch.uint8) if num_tiles else None,
        "cu_seqlens": [0, num_tokens],
        "image_token_indices": torch.zeros(num_image_tokens, dtype=torch.long),
        "loss_indices": torch.zeros(max(1, num_tokens - num_image_tokens - num_rows), dtype=torch.long),
    }


# -- weights and what the optimizer keeps ------------------------------------------------------------------------------


def estimate_memory(
    model: InternVLChatModel,
    activations: int,
    zero: dict | None,
    num_gpus: int,
    moment_bytes: float = 8,
    quantized_parts: Iterable[str] = (),
) -> MemoryEstimate:
    """Add what ranks keep to the activations of a step.

    Args:
        model: on the meta device or of fake tensors, with the dtypes of training.
        zero: the block `zero_optimization` of DeepSpeed's configuration, without "auto"; None without DeepSpeed.
        moment_bytes: of the optimizer's moments, per trainable parameter.
        quantized_parts: attributes of the model whose linear layers have 4-bit weights.
    """
    stage = (zero or {}).get("stage", 0)
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    num_trainable = sum(parameter.numel() for parameter in trainable)
    trainable_bytes = sum(parameter.nbytes for parameter in trainable)
    quantized = [weight for part in quantized_parts for weight in find_quantized_weights(getattr(model, part))]
    saved_bytes = sum(weight.nbytes - int(NF4_BYTES * weight.numel()) for weight in quantized)
    dequantized = max((weight.nbytes for weight in quantized), default=0)  # one layer at a time
    weights = sum(parameter.nbytes for parameter in parameters) - saved_bytes
    buffers = 0
    if stage == 3:
        weights, buffers = partition_weights(parameters, zero or {}, num_gpus)
    elif zero is None and num_gpus > 1:
        buffers = trainable_bytes  # DDP's buckets
    if zero is not None:
        num_buckets = 2 if zero.get("overlap_comm") and stage < 3 else 1
        bucket_size = min(int(zero.get("reduce_bucket_size", 5e8)), num_trainable)  # `limit_reduce_bucket`
        buffers += num_buckets * bucket_size * trainable[0].itemsize
    # fp32 weight and gradient of a step; a trainable parameter in fp32 is its own copy
    master_bytes = 8 if zero is not None and trainable[0].itemsize < 4 else 0
    optimizer = int((master_bytes + moment_bytes) * num_trainable) // (num_gpus if stage >= 1 else 1)
    return MemoryEstimate(
        weights=weights,
        gradients=trainable_bytes // (num_gpus if stage >= 2 else 1),
        optimizer=0 if is_offloaded(zero, "offload_optimizer") else optimizer,
        activations=activations + dequantized,
        buffers=buffers,
    )


def is_offloaded(zero: dict | None, key: str) -> bool:
    """Return whether the host keeps `offload_optimizer` or `offload_param`."""
    return ((zero or {}).get(key) or {}).get("device", "none") != "none"


def find_quantized_weights(part: nn.Module) -> list[torch.Tensor]:
    """List the weights that QLoRA keeps in 4 bits.

    These are linear layers except the LM head and adapters.
    """
    get_head = getattr(unwrap_peft(part), "get_output_embeddings", lambda: None)
    return [
        layer.weight
        for layer in part.modules()
        if isinstance(layer, nn.Linear) and layer is not get_head() and not layer.weight.requires_grad
    ]


def partition_weights(parameters: list[nn.Parameter], zero: dict, num_gpus: int) -> tuple[int, int]:
    """Return the bytes of a rank's weights under ZeRO-3 and of gathered ones.

    Small parameters stay on every rank. As many others are gathered as the configuration allows, and the largest of
    them may be in flight. With `offload_param` the host keeps a rank's share.
    """
    threshold = int(zero.get("stage3_param_persistence_threshold", 1e5))
    persistent = sum(parameter.nbytes for parameter in parameters if parameter.numel() <= threshold)
    partitioned = [parameter for parameter in parameters if parameter.numel() > threshold]
    num_partitioned = sum(parameter.numel() for parameter in partitioned)
    itemsize = partitioned[0].itemsize if partitioned else 0
    largest = max((parameter.numel() for parameter in partitioned), default=0)
    max_live = max(min(int(zero.get("stage3_max_live_parameters", 1e9)), num_partitioned), largest)
    in_flight = max(min(int(zero.get("stage3_prefetch_bucket_size", 5e7)), num_partitioned), largest)
    all_bytes = sum(parameter.nbytes for parameter in parameters)
    share = 0 if is_offloaded(zero, "offload_param") else all_bytes // num_gpus
    return share + persistent, (max_live + in_flight) * itemsize
