"""InternViT, the vision encoder of the chat model.

Tiles (T, 3, H, W) -> hidden states (T, N, C): T tiles, N = 1 + patches (a class token first), C hidden size. The 300M
and the 6B encoder share this code; their configurations select the norms. Parameter names are upstream's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from internvl.model.internvl_chat.configuration_intern_vit import InternVisionConfig

try:
    from flash_attn import flash_attn_func

    has_flash_attn = True
except ImportError:
    has_flash_attn = False


def compute_attention(q, k, v, dropout: float = 0.0, use_flash: bool = True) -> torch.Tensor:
    """Compute full attention by flash-attn where possible, else by torch.

    q, k, v (T, N, heads, D) -> (T, N, heads, D).
    """
    if use_flash and has_flash_attn and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return flash_attn_func(q, k, v, dropout_p=dropout)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)


class InternRMSNorm(nn.Module):
    """RMS norm `weight * x / rms(x)`, with statistics in float32.

    In bfloat16 it rounds once, at the end; upstream also rounds before the product with the weight.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return compute_rms_norm(x, self.weight, self.variance_epsilon)


def compute_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute an RMS norm over the last axis.

    It is one kernel on CUDA from torch 2.9 on. The result has the dtype of x. So has the weight in the product: the
    kernel requires it.
    """
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


NORM2FN = {"rms_norm": InternRMSNorm, "layer_norm": nn.LayerNorm}


class PatchEmbedding(nn.Conv2d):
    """A convolution of non-overlapping patches, computed as one matrix product.

    It maps tiles (T, 3, H, W) to (T, C, h, w), in the memory order (T, h, w, C), and ignores pixels after the last
    complete patch, as a convolution does. On a CPU it is 1.3 to 3 times as fast as torch's convolution.
    """

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        patch_height, patch_width = self.kernel_size
        h, w = tiles.shape[2] // patch_height, tiles.shape[3] // patch_width
        tiles = tiles[:, :, : h * patch_height, : w * patch_width]
        patches = tiles.unflatten(3, (w, patch_width)).unflatten(2, (h, patch_height))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (T, h, w, 3 * patch_height * patch_width)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class InternVisionEmbeddings(nn.Module):
    """Class token and patch embeddings, plus position embeddings."""

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.config = config
        self.embed_dim = config.hidden_size
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.num_patches = (self.image_size // self.patch_size) ** 2
        self.num_positions = self.num_patches + 1
        self.class_embedding = nn.Parameter(torch.randn(1, 1, self.embed_dim))
        self.patch_embedding = PatchEmbedding(config.num_channels, self.embed_dim, self.patch_size, self.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, self.num_positions, self.embed_dim))

    def get_position_embedding(self, height: int, width: int) -> torch.Tensor:
        """Return the position embedding (1, 1 + height * width, C)."""
        side = self.image_size // self.patch_size
        if (height, width) == (side, side):
            return self.position_embedding
        return resize_position_embedding(self.position_embedding, side, (height, width))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (T, C, h, w)
        num_tiles, _, height, width = patches.shape
        patches = patches.flatten(2).transpose(1, 2)  # (T, h * w, C)
        class_token = self.class_embedding.expand(num_tiles, 1, -1).to(patches.dtype)
        positions = self.get_position_embedding(height, width).to(patches.dtype)
        return torch.cat([class_token, patches], dim=1) + positions


def resize_position_embedding(position_embedding: torch.Tensor, side: int, size: tuple[int, int]) -> torch.Tensor:
    """Resize a position embedding to another grid of patches.

    (1, 1 + side * side, C), bicubic, in float32. The row of the class token is unchanged.
    """
    class_row, grid = position_embedding[:, :1], position_embedding[:, 1:]
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    return torch.cat([class_row, grid.flatten(2).transpose(1, 2).to(class_row.dtype)], dim=1)


class InternAttention(nn.Module):
    """Multi-head self-attention.

    With `qk_normalization`, queries and keys have an RMS norm over all heads together.
    """

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim, remainder = divmod(config.hidden_size, self.num_heads)
        if remainder:
            raise ValueError(
                f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {self.num_heads}"
            )
        self.use_flash_attn = config.use_flash_attn
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.attn_drop = nn.Dropout(config.attention_dropout)
        self.proj_drop = nn.Dropout(config.dropout)
        has_norm = config.qk_normalization
        self.q_norm = InternRMSNorm(config.hidden_size, config.layer_norm_eps) if has_norm else nn.Identity()
        self.k_norm = InternRMSNorm(config.hidden_size, config.layer_norm_eps) if has_norm else nn.Identity()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(hidden_states).chunk(3, dim=-1)  # (T, N, C) each
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in (q, k, v))
        dropout = self.attn_drop.p if self.training else 0.0
        output = compute_attention(q, k, v, dropout, self.use_flash_attn).flatten(2)
        return self.proj_drop(self.proj(output))


class InternMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class _AddFrozenLayerScale(torch.autograd.Function):
    """`residual + x * scale` for a frozen scale, without saved tensors.

    Activation recomputation stops as soon as it has all saved tensors. torch's own `addcmul` would save `scale`. This
    one saves nothing, so the matrix product before it, the last one of a block, is not recomputed.
    """

    @staticmethod
    def forward(ctx, residual: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.scale = scale
        return torch.addcmul(residual, x, scale)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        return gradient, gradient * ctx.scale, None


def add_layer_scale(residual: torch.Tensor, x: torch.Tensor, scale: nn.Parameter) -> torch.Tensor:
    """Compute residual (..., C) + x (..., C) * scale (C,) in one pass."""
    add_fn = torch.addcmul if scale.requires_grad or torch.compiler.is_compiling() else _AddFrozenLayerScale.apply
    return add_fn(residual, x, scale)


class InternVisionEncoderLayer(nn.Module):
    """A pre-norm transformer block with layer scale and stochastic depth."""

    # The same attributes as the layers of LLMs in transformers 5, see `activation_checkpointing.py`.
    gradient_checkpointing = False
    _gradient_checkpointing_func = staticmethod(checkpoint)

    def __init__(self, config: InternVisionConfig, drop_path_rate: float):
        super().__init__()
        norm = NORM2FN[config.norm_type]
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.drop_path1 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = add_layer_scale(x, self.drop_path1(self.attn(self.norm1(x).to(x.dtype))), self.ls1)
        return add_layer_scale(x, self.drop_path2(self.mlp(self.norm2(x).to(x.dtype))), self.ls2)


class InternVisionEncoder(nn.Module):
    """All layers of InternViT."""

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        last = max(config.num_hidden_layers - 1, 1)
        # Drop rates grow linearly. They are Python numbers, not a tensor, for models on the meta device.
        rates = [config.drop_path_rate * layer / last for layer in range(config.num_hidden_layers)]
        self.layers: Any = nn.ModuleList([InternVisionEncoderLayer(config, rate) for rate in rates])

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether any layer recomputes its activations; setting it applies to all layers."""
        return any(layer.gradient_checkpointing for layer in self.layers)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, is_enabled: bool):
        for layer in self.layers:
            layer.gradient_checkpointing = is_enabled

    def forward(self, inputs_embeds: torch.Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        """Run all layers on embeddings (T, N, C).

        With `output_hidden_states`, `hidden_states` has the embeddings and the output of each layer.
        """
        x, states = inputs_embeds, [inputs_embeds]
        for layer in self.layers:
            # Frozen layers before the first trainable one have no graph, and nothing to recompute.
            if layer.gradient_checkpointing and self.training and (x.requires_grad or has_trainable_parameters(layer)):
                # Not reentrant: adapters get gradients although the input of a frozen encoder requires none.
                x = layer._gradient_checkpointing_func(layer, x, use_reentrant=False)
            else:
                x = layer(x)
            states.append(x)
        return BaseModelOutput(last_hidden_state=x, hidden_states=tuple(states) if output_hidden_states else None)


def has_trainable_parameters(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class InternVisionModel(PreTrainedModel):
    """InternViT: embeddings and layers, without a final norm."""

    main_input_name = "pixel_values"
    config_class = InternVisionConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVisionEncoderLayer"]
    # The names of this attribute in transformers 4 and 5.
    _supports_flash_attn_2 = _supports_flash_attn = _supports_sdpa = True

    def __init__(self, config: InternVisionConfig):
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        self.post_init()

    def _init_weights(self, module):
        """Keep the initial values of the constructors."""

    def resize_pos_embeddings(self, old_size: int, new_size: int, patch_size: int):
        """Replace the position embedding by one for tiles of `new_size` pixels.

        The configuration is not changed.
        """
        side, new_side = old_size // patch_size, new_size // patch_size
        resized = resize_position_embedding(self.embeddings.position_embedding.detach(), side, (new_side, new_side))
        self.embeddings.position_embedding = nn.Parameter(resized)
        self.embeddings.image_size = new_size

    def get_input_embeddings(self) -> nn.Module:
        """Return the embeddings, where PEFT's `enable_input_require_grads` registers its hook."""
        return self.embeddings

    def forward(self, pixel_values=None, output_hidden_states=None, return_dict=None, pixel_embeds=None):
        """Encode tiles (T, 3, H, W) or embeddings `pixel_embeds` (T, N, C).

        Returns:
            BaseModelOutputWithPooling, or a tuple with `return_dict=False`. `last_hidden_state` (T, N, C) is the output
            of the last layer, without a norm; `pooler_output` (T, C) is its class token; `hidden_states` has the
            embeddings and the output of each layer.
        """
        if pixel_values is None and pixel_embeds is None:
            raise ValueError("InternVisionModel requires pixel_values or pixel_embeds")
        if pixel_embeds is None:
            if pixel_values.ndim != 4:
                raise ValueError(f"pixel_values must be (tiles, 3, height, width), got {tuple(pixel_values.shape)}")
            pixel_embeds = self.embeddings(pixel_values)
            if self.training and not (pixel_values.requires_grad or has_trainable_parameters(self.embeddings)):
                # PEFT's hook makes the output of frozen embeddings require grad, which only reentrant checkpointing
                # needs. `detach` undoes this: the frozen layers that follow build no graph.
                pixel_embeds = pixel_embeds.detach()
        encoded = self.encoder(pixel_embeds, bool(output_hidden_states))
        output = BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=encoded.last_hidden_state[:, 0],
            hidden_states=encoded.hidden_states,
        )
        return output if return_dict is not False else output.to_tuple()
