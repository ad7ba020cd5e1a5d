"""PEFT's LoRA layer with a cheaper forward: `lora.wrap` asks PEFT for it where PEFT would make its own.

Parameters, their names, files, merging and every variant are PEFT's. What differs is how the plain update is computed:
scaled and added in one product, without a copy in fp32, and from one dropout mask where several layers (query, key and
value; gate and up) read the same input. PEFT of upstream's pin has no way to be asked, and keeps its own layer.
"""

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from torch import nn


class LoraLinear(Linear):
    """`x W' + (dropout(x) A') B' scaling`, for x of (..., in): (..., out).

    What is beyond one active, unmerged, plain adapter on a plain linear layer is left to PEFT's forward.
    """

    shared = None  # the `SharedInput` of layers that may read the same input

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        name = self._plain_adapter(x)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        lora_A, lora_B, scaling = self.lora_A[name], self.lora_B[name], self.scaling[name]
        flat, dropped = (self.shared or _read)(x, self.lora_dropout[name])
        result, update = self.base_layer(flat), lora_A(dropped)
        if _must_be_called(lora_B) or _must_be_called(self.base_layer):
            result = result + lora_B(update * scaling)
        else:  # nobody else holds the result: it need not be copied
            result.addmm_(update, lora_B.weight.t().to(result.dtype), alpha=scaling)
        return result.view(*x.shape[:-1], result.shape[-1])

    def _plain_adapter(self, x: torch.Tensor) -> str | None:
        """The name of the one adapter that acts, if it is of the plain kind."""
        base, names = self.base_layer, self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or type(base) is not nn.Linear:
            return None
        name = names[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_B[name].bias is not None:
            return None
        cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        return name if cast or x.dtype == base.weight.dtype == self.lora_A[name].weight.dtype else None


class SharedInput:
    """What layers of one parent read, kept until the parent's forward ends: the second reader finds it there.

    An input is known by identity, and held while it is: no other tensor can take its place.
    """

    def __init__(self):
        self.kept = None

    def __call__(self, x: torch.Tensor, dropout: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        rate, kept = getattr(dropout, "p", 0.0), self.kept  # once: replicas of the parent may run in other threads
        if kept is None or kept[0] is not x or kept[1] != rate:
            kept = self.kept = (x, rate, _read(x, dropout))
        return kept[2]

    def release(self, *_):
        """A forward hook of the parent."""
        self.kept = None


def _read(x: torch.Tensor, dropout: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x (..., in), what the base layer and what its adapter reads, (tokens, in) in the dtype they compute in."""
    kind = x.device.type
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_autocast_enabled(kind):
        flat = flat.to(torch.get_autocast_dtype(kind))
    return flat, _drop(flat, dropout)


def _drop(x: torch.Tensor, dropout: nn.Module) -> torch.Tensor:
    """`dropout(x)`; on a CPU, where torch spends nearly all of its time on random numbers, with 16 bits an element.

    The rate is a multiple of 2 ** -16 then. The mask that is kept for the gradient has a byte an element.
    """
    wanted = type(dropout) is nn.Dropout and dropout.training and 0 < dropout.p < 1
    if not wanted or x.device.type != "cpu" or torch.compiler.is_compiling():
        return dropout(x)
    threshold = min(round(dropout.p * 2**16), 2**16 - 1)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    zero = bits[: x.numel()].view(x.shape) < threshold - 2**15
    return torch.where(zero, 0.0, x * (2**16 / (2**16 - threshold)))


def _must_be_called(module: nn.Module) -> bool:
    """Whether something happens when the module is called, such as ZeRO-3 gathering its weight."""
    hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__
    return bool(hooked) or type(module) is not nn.Linear


def ask_for(config: LoraConfig):
    """Has PEFT make this layer of every plain linear one."""
    if hasattr(config, "_register_custom_module"):
        config._register_custom_module({nn.Linear: _make})


def _make(target: nn.Linear, adapter_name: str, parameter_name: str | None = None, **settings) -> LoraLinear | None:
    """None leaves a layer to PEFT: quantised ones, of a class of their own or with weights of one."""
    if type(target) is nn.Linear and type(target.weight) is nn.Parameter and parameter_name is None:
        return LoraLinear(target, adapter_name, **settings)
    return None


def share_inputs(model: PeftModel):
    """Lets the adapted layers of each module share what they read."""
    for parent in model.modules():
        layers = [layer for layer in parent.children() if isinstance(layer, LoraLinear)]
        if len(layers) > 1 and not isinstance(parent, (nn.ModuleList, nn.ModuleDict)):  # these are never called
            shared = SharedInput()
            parent.register_forward_hook(shared.release, always_call=True)  # also where recomputation stops early
            for layer in layers:
                layer.shared = shared
