"""PEFT's LoRA layer with a faster forward pass.

`lora.add_adapters` registers `LoraLinear` with PEFT, which then creates it instead of its `Linear`. Parameters,
names, files, merging and variants stay PEFT's. PEFT 0.10, which upstream pins, has no such registry and keeps its own
layer.
"""

from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from torch import nn
from torch.nn import functional

from internvl.model.lora_dropout import apply_dropout

# Names of sibling layers that read the same input: attention, MLP, MLP of InternLM2.
SHARED_INPUT_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


class LoraLinear(Linear):
    """A linear layer plus its scaled LoRA adapter.

    Maps x (..., in) to `x W^T + bias + scaling * dropout(x) A^T B^T`, (..., out), with W (out, in), A (r, in) and
    B (out, r). Two things make it faster than PEFT's layer:

    - The scaled adapter output is added by the matrix products themselves (`addmm`): no tensor of size (..., out) is
      made for the adapter alone, and x is not copied to float32 under autocast.
    - Sibling layers with the same input (query, key and value; gate and up) share one dropout mask, and one product
      with their stacked A matrices.

    This path needs exactly one active, unmerged, plain adapter on an `nn.Linear`; PEFT's forward does the rest.
    """

    shared_input: "SharedInput | None" = None  # set by `share_layer_inputs` in layers with siblings
    is_in_place = True  # whether the base layer's product is added into the adapter's output in place

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        adapter = self.find_plain_adapter(x)
        if adapter is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        lora_B: Any = self.lora_B[adapter]
        base: Any = self.base_layer
        scaling = self.scaling[adapter]
        flat = flatten_tokens(x)  # (tokens, in)
        if self.shared_input:
            down = self.shared_input.project_down(self, x, flat, adapter)
        else:
            down = self.project_down(flat, adapter)  # (tokens, r)
        # The large product, that of the base layer, comes last: activation recomputation stops as soon as it has all
        # tensors that the backward pass needs. This product's output is not one of them, so it is not recomputed.
        if has_custom_call(lora_B) or has_custom_call(base):
            output = lora_B(down * scaling) + base(flat)
        else:
            up_weight, weight = (w.t().to(down.dtype) for w in (lora_B.weight, base.weight))  # (r, out), (in, out)
            bias = up_weight.new_empty(()) if base.bias is None else base.bias.to(up_weight.dtype)
            output = torch.addmm(bias, down, up_weight, beta=base.bias is not None, alpha=scaling)
            add_product = output.addmm_ if self.is_in_place else output.addmm
            output = add_product(flat, weight)
        return output.view(*x.shape[:-1], output.shape[-1])

    def project_down(self, flat: torch.Tensor, adapter: str) -> torch.Tensor:
        """Compute `dropout(flat) A^T`, (tokens, in) -> (tokens, r)."""
        return self.lora_A[adapter](apply_dropout(flat, self.lora_dropout[adapter]))

    def find_plain_adapter(self, x: torch.Tensor) -> str | None:
        """Return the active adapter's name if the fast path supports it."""
        base, names = self.base_layer, self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or type(base) is not nn.Linear:
            return None
        name = names[0]
        # `lora_variant` has an entry for DoRA and the like.
        if name not in self.lora_A or name in self.lora_variant or self.lora_B[name].bias is not None:
            return None
        # Autocast makes all dtypes equal, except that it leaves float64 as it is.
        is_cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        return name if is_cast or x.dtype == base.weight.dtype == self.lora_A[name].weight.dtype else None


class CachedInput(NamedTuple):
    """The input of a layer and what its siblings reuse."""

    x: torch.Tensor
    adapter: str
    dropout_rate: float
    dropped: torch.Tensor  # (tokens, in): the input after dropout
    projections: dict[str, torch.Tensor]  # name of a layer -> `dropped A^T`, (tokens, r)

    def matches(self, x: torch.Tensor, adapter: str, dropout_rate: float) -> bool:
        is_same_setting = (adapter, dropout_rate) == (self.adapter, self.dropout_rate)
        return is_same_setting and (x is self.x or is_same_memory(x, self.x))


class SharedInput:
    """A cache of what sibling layers compute from their common input.

    It is filled by the first layer and cleared when the forward pass of their parent ends. The input is recognized by
    identity or by its memory, and is held until then: no other tensor can get the same memory.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...]):
        self.parent, self.names = parent, names
        self.cached: CachedInput | None = None

    def get_layers(self) -> dict[str, LoraLinear]:
        """Return the adapted layers by name.

        They are not stored: adapters may be unloaded meanwhile.
        """
        children = {name: self.parent._modules.get(name) for name in self.names}
        return {name: layer for name, layer in children.items() if isinstance(layer, LoraLinear)}

    def project_down(self, layer: LoraLinear, x: torch.Tensor, flat: torch.Tensor, adapter: str) -> torch.Tensor:
        """Compute `layer.project_down(flat, adapter)`, from the cache where possible."""
        layer_name = next((name for name, sibling in self.get_layers().items() if sibling is layer), None)
        if layer_name is None:  # a replica of the layer on another device
            return layer.project_down(flat, adapter)
        dropout, cached = layer.lora_dropout[adapter], self.cached
        rate: Any = getattr(dropout, "p", 0.0)
        if cached is None or not cached.matches(x, adapter, rate):
            dropped = apply_dropout(flat, dropout)
            cached = CachedInput(x, adapter, rate, dropped, self._project_all(x, adapter, dropped))
            self.cached = cached
        if layer_name in cached.projections:
            return cached.projections[layer_name]
        return layer.lora_A[adapter](cached.dropped)

    def _project_all(self, x: torch.Tensor, adapter: str, dropped: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute `dropped A^T`, (tokens, r), of all layers in one product.

        Layers whose A must be called as a module are left out.
        """
        layers = {name: layer for name, layer in self.get_layers().items() if layer.find_plain_adapter(x) == adapter}
        lora_As = {name: layer.lora_A[adapter] for name, layer in layers.items()}
        weights: dict[str, Any] = {
            name: lora_A.weight for name, lora_A in lora_As.items() if not has_custom_call(lora_A)
        }
        if len(weights) < 2:
            return {}
        product = functional.linear(dropped, torch.cat(list(weights.values())))  # (tokens, sum of ranks)
        return dict(zip(weights, product.split([len(weight) for weight in weights.values()], -1), strict=True))

    def clear(self, *_):
        """Drop the cached input; a forward hook of the parent."""
        self.cached = None


def is_same_memory(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are the same view of the same memory.

    ZeRO-3 wraps the input of each module in a new tensor.
    """
    if torch.compiler.is_compiling() or x.requires_grad != other.requires_grad:
        return False
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) == (other.data_ptr(), other.shape, other.stride(), other.dtype)


def flatten_tokens(x: torch.Tensor) -> torch.Tensor:
    """Reshape (..., in) to (tokens, in), in the dtype of autocast."""
    device_type, flat = x.device.type, x.reshape(-1, x.shape[-1])
    return flat.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else flat


def has_custom_call(module: nn.Module) -> bool:
    """Return whether calling the module does more than `x W^T`.

    For example, a hook of ZeRO-3 gathers the weight. Then the module must be called: its weight alone is not usable.
    """
    has_hooks = module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__
    return bool(has_hooks) or type(module) is not nn.Linear


def register_lora_linear(config: LoraConfig):
    """Make PEFT create `LoraLinear` for each `nn.Linear`."""
    if hasattr(config, "_register_custom_module"):  # not in PEFT 0.10
        # pyrefly: ignore[bad-assignment]  # PEFT declares a class and calls it: a function will do
        config._register_custom_module({nn.Linear: _create_lora_linear})


def _create_lora_linear(
    target: nn.Linear, adapter_name: str, parameter_name: str | None = None, **settings
) -> LoraLinear | None:
    """Create a `LoraLinear`, or return None to use PEFT's own layer.

    That is for quantized layers and other subclasses of `nn.Linear`.
    """
    if type(target) is nn.Linear and type(target.weight) is nn.Parameter and parameter_name is None:
        return LoraLinear(target, adapter_name, **settings)
    return None


def share_layer_inputs(model: PeftModel):
    """Make adapted sibling layers share their dropout mask and product."""
    for parent in model.modules():
        for names in SHARED_INPUT_LAYERS:
            shared_input = SharedInput(parent, names)
            if len(layers := shared_input.get_layers()) > 1:
                # always_call: also where activation recomputation ends early, by an exception
                parent.register_forward_hook(shared_input.clear, always_call=True)
                for layer in layers.values():
                    layer.shared_input = shared_input
