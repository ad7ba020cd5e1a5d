"""PEFT's LoRA layer with a cheaper forward: `lora.add_adapters` asks PEFT for it where PEFT would make its own.

Parameters, their names, files, merging and every variant are PEFT's. What differs is how the plain update is computed:
scaled and added in one product, without a copy in fp32; and layers that read the same input (query, key and value; gate
and up) drop it once, by one mask, and multiply it by their A in one product. PEFT of upstream's pin has no way to be
asked, and keeps its own layer.
"""

from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from torch import nn
from torch.nn import functional

from internvl.model.lora_dropout import drop

# Names of layers that read the same input where one module has them: attention; MLPs; those of InternLM2.
READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


class LoraLinear(Linear):
    """`x W' + scaling (dropout(x) A') B'`, for x of (..., in): (..., out).

    What is beyond one active, unmerged, plain adapter on a plain linear layer is left to PEFT's forward.
    """

    shared = None  # the `SharedInput` of layers that may read the same
    in_place = True  # the update is added into the output of the base layer

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        name = self.plain_adapter(x)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        lora_B, base, scaling = self.lora_B[name], self.base_layer, self.scaling[name]
        flat = flattened(x)
        update = self.shared.read(self, x, flat, name) if self.shared else self.read(flat, name)
        # The large product comes last: where activations are computed again, and nothing needs this layer's output,
        # torch's checkpoint stops before it, having all that the backward pass asks for.
        if must_be_called(lora_B) or must_be_called(base):
            result = lora_B(update * scaling) + base(flat)
        else:
            up, weight = (w.t().to(update.dtype) for w in (lora_B.weight, base.weight))
            bias = up.new_empty(()) if base.bias is None else base.bias.to(up.dtype)
            result = torch.addmm(bias, update, up, beta=base.bias is not None, alpha=scaling)
            add = result.addmm_ if self.in_place else result.addmm
            result = add(flat, weight)
        return result.view(*x.shape[:-1], result.shape[-1])

    def read(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """`dropout(flat) A'`, (tokens, r)."""
        return self.lora_A[name](drop(flat, self.lora_dropout[name]))

    def plain_adapter(self, x: torch.Tensor) -> str | None:
        """The name of the one adapter that acts, if it is of the plain kind."""
        base, names = self.base_layer, self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or type(base) is not nn.Linear:
            return None
        name = names[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_B[name].bias is not None:
            return None
        cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        return name if cast or x.dtype == base.weight.dtype == self.lora_A[name].weight.dtype else None


class Kept(NamedTuple):
    """What one of the layers has read for all: input, adapter and rate of dropout tell whether another may use it."""

    x: torch.Tensor
    adapter: str
    rate: float
    dropped: torch.Tensor
    updates: dict[str, torch.Tensor]

    def is_of(self, x: torch.Tensor, adapter: str, rate: float) -> bool:
        return (self.adapter, self.rate) == (adapter, rate) and (x is self.x or is_alias(x, self.x))


class SharedInput:
    """What the layers `names` of one parent read, kept until the parent's forward ends: the second finds it there.

    An input is known by identity, or by its memory, and held while it is: nothing else can take its place.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...]):
        self.parent, self.names, self.kept = parent, names, None

    def layers(self) -> dict[str, LoraLinear]:
        """By name; asked for anew each time, as adapters may have been taken out."""
        found = {name: self.parent._modules.get(name) for name in self.names}
        return {name: layer for name, layer in found.items() if isinstance(layer, LoraLinear)}

    def read(self, layer: LoraLinear, x: torch.Tensor, flat: torch.Tensor, adapter: str) -> torch.Tensor:
        """As `layer.read`, of x flattened."""
        place = next((name for name, own in self.layers().items() if own is layer), None)
        if place is None:  # a replica of the layer, on another device
            return layer.read(flat, adapter)
        dropout, kept = layer.lora_dropout[adapter], self.kept
        rate = getattr(dropout, "p", 0.0)
        if kept is None or not kept.is_of(x, adapter, rate):
            dropped = drop(flat, dropout)
            kept = self.kept = Kept(x, adapter, rate, dropped, self._updates(x, adapter, dropped))
        return kept.updates[place] if place in kept.updates else layer.lora_A[adapter](kept.dropped)

    def _updates(self, x: torch.Tensor, adapter: str, dropped: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name of a layer -> `dropped A'` (tokens, r), in one product for all whose A need not be called."""
        plain = {name: layer for name, layer in self.layers().items() if layer.plain_adapter(x) == adapter}
        down = {name: layer.lora_A[adapter] for name, layer in plain.items()}
        weights = {name: lora_A.weight for name, lora_A in down.items() if not must_be_called(lora_A)}
        if len(weights) < 2:
            return {}
        product = functional.linear(dropped, torch.cat(list(weights.values())))
        return dict(zip(weights, product.split([len(weight) for weight in weights.values()], -1), strict=True))

    def release(self, *_):
        """A forward hook of the parent."""
        self.kept = None


def is_alias(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are one tensor in different wraps: ZeRO-3 gives each module its own of what it reads."""
    if torch.compiler.is_compiling() or x.requires_grad != other.requires_grad:
        return False
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) == (other.data_ptr(), other.shape, other.stride(), other.dtype)


def flattened(x: torch.Tensor) -> torch.Tensor:
    """x (..., in) as (tokens, in), in the dtype that linear layers compute in."""
    kind, flat = x.device.type, x.reshape(-1, x.shape[-1])
    return flat.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else flat


def must_be_called(module: nn.Module) -> bool:
    """Whether something happens when the module is called, such as ZeRO-3 gathering its weight."""
    hooked = module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__
    return bool(hooked) or type(module) is not nn.Linear


def use_lora_linear(config: LoraConfig):
    """Has PEFT make this layer of every plain linear one."""
    if hasattr(config, "_register_custom_module"):
        config._register_custom_module({nn.Linear: _make})


def _make(target: nn.Linear, adapter_name: str, parameter_name: str | None = None, **settings) -> LoraLinear | None:
    """None leaves a layer to PEFT: quantised ones, of a class of their own or with weights of one."""
    if type(target) is nn.Linear and type(target.weight) is nn.Parameter and parameter_name is None:
        return LoraLinear(target, adapter_name, **settings)
    return None


def share_inputs(model: PeftModel):
    """Lets adapted layers share what they read."""
    for parent in model.modules():
        for names in READ_TOGETHER:
            shared = SharedInput(parent, names)
            if len(layers := shared.layers()) > 1:
                parent.register_forward_hook(shared.release, always_call=True)  # also where recomputation stops early
                for layer in layers.values():
                    layer.shared = shared
