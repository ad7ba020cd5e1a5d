"""Count the operators that would make the CPU wait for a GPU, on a machine without one."""

import os
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

# Their result, or its size, is read on the CPU.
SYNCHRONIZING_OPERATORS = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "masked_scatter_backward", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}


class SynchronizationCounter(TorchDispatchMode):
    """Counter of the operators that synchronize, by name and caller, while it is enabled.

    Any tensor counts as one on a GPU, except that a copy counts only from one device to another: fake CUDA tensors show
    those.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.is_enabled = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.is_enabled and is_synchronizing(func, args, kwargs):
            self.counts[f"{func} {find_caller()}"] += 1
        return func(*args, **kwargs)


def find_caller() -> str:
    """Return the innermost line outside of torch and this file."""
    for frame, line in traceback.walk_stack(None):
        file = frame.f_code.co_filename
        if file != __file__ and f"{os.sep}torch{os.sep}" not in file:
            return f"{os.path.basename(file)}:{line}"
    return "?"


def is_synchronizing(func, args: tuple, kwargs: dict) -> bool:
    """Return whether a call of an operator would synchronize."""
    name = func.overloadpacket.__name__
    if name in SYNCHRONIZING_OPERATORS:
        return True
    if name.startswith(("index", "_index", "_unsafe_index")) and isinstance(args[1], list | tuple):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave" and isinstance(args[-1], torch.Tensor):
        return kwargs.get("output_size") is None
    if name == "_to_copy":
        source = args[0].device
        return is_blocking_copy(source, kwargs.get("device") or source, kwargs.get("non_blocking", False))
    if name == "copy_" and isinstance(args[1], torch.Tensor):
        return is_blocking_copy(args[1].device, args[0].device, args[2] if len(args) > 2 else False)
    return False


def is_blocking_copy(source: torch.device, target: torch.device, non_blocking: bool) -> bool:
    """Return whether the CPU waits for a copy. What it reads, it must wait for."""
    return source.type != target.type and (target.type == "cpu" or not non_blocking)


@contextmanager
def fake_device(module: nn.Module, device: str) -> Iterator[None]:
    """Put a module on a fake device, within a context.

    Tensors there have shapes and no values: an operator that reads values raises an error. Without a GPU, torch (2.6 to
    2.14) runs backward passes on the fake CPU only, and shows copies between devices on the fake GPU only.
    """
    stores = [store for part in module.modules() for store in (part._parameters, part._buffers)]
    real = [dict(store) for store in stores]
    fakes: dict[torch.Tensor | None, torch.Tensor | None] = {None: None}
    with FakeTensorMode():
        for store in stores:
            for name, tensor in store.items():
                if tensor not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    fakes[tensor] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                store[name] = fakes[tensor]
        try:
            yield
        finally:
            for store, tensors in zip(stores, real, strict=True):
                store.update(tensors)


def make_fake(batch: dict) -> dict:
    """Replace the tensors of a batch by fake ones on the CPU; call it in `fake_device`."""
    return {
        key: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def assert_one_synchronization_a_step(trainer) -> None:
    """Train two steps, and check that they synchronize only for the norm of the gradient."""
    counts = count_in_micro_batches(trainer)
    assert counts.keys() == {0, 1}
    for callers in counts.values():
        [(caller, count)] = callers.items()
        assert caller.startswith("aten._local_scalar_dense.default trainer.py") and count == 1, callers


def count_in_micro_batches(trainer) -> dict[int, Counter[str]]:
    """Train, and count the operators that synchronize in the micro-batches of each step.

    The work on a batch that is still on the CPU does not count, nor does what follows the last micro-batch of a step.
    """
    counts: dict[int, Counter[str]] = {}
    counter = SynchronizationCounter()
    training_step, prepare_inputs = trainer.training_step, trainer._prepare_inputs

    def count_step(*args, **kwargs):
        counter.counts = counts.setdefault(trainer.state.global_step, Counter())
        counter.is_enabled = True
        return training_step(*args, **kwargs)

    def prepare_uncounted(inputs):
        counter.is_enabled = False
        inputs = prepare_inputs(inputs)
        counter.is_enabled = True
        return inputs

    class StopCounting(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            counter.is_enabled = False

        on_substep_end = on_pre_optimizer_step

    trainer.training_step, trainer._prepare_inputs = count_step, prepare_uncounted
    trainer.add_callback(StopCounting())
    counter.is_enabled = False
    with counter:
        trainer.train()
    return counts
