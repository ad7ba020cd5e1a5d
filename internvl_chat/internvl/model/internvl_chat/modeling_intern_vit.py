"""InternViT: tiles (T, 3, H, W) -> hidden states (T, 1 + patches, C). The first stage of the chat model.

The same code is the 300M and the 6B encoder; their configurations choose the norms. Parameter names are upstream's.
"""

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


def attention(q, k, v, dropout: float = 0.0, use_flash: bool = True) -> torch.Tensor:
    """Full attention of q, k, v (B, N, heads, D) -> (B, N, heads, D): flash-attn where it can run, else torch's own."""
    if use_flash and has_flash_attn and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return flash_attn_func(q, k, v, dropout_p=dropout)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)


class InternRMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


NORM2FN = {"rms_norm": InternRMSNorm, "layer_norm": nn.LayerNorm}


class PatchEmbedding(nn.Conv2d):
    """A convolution whose patches do not overlap, as one matrix product: on a CPU 1.3 to 3 times as fast as torch's.

    Tiles (T, 3, H, W) -> (T, C, h, w) in memory order (T, h, w, C); pixels beyond the last whole patch are left out.
    """

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        down, right = self.kernel_size
        height, width = tiles.shape[2] // down, tiles.shape[3] // right
        tiles = tiles[:, :, : height * down, : width * right]
        patches = tiles.unflatten(3, (width, right)).unflatten(2, (height, down))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (T, h, w, 3 * down * right)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class InternVisionEmbeddings(nn.Module):
    """Tiles -> patch embeddings behind one class token, plus positions."""

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

    def positions(self, height: int, width: int) -> torch.Tensor:
        """The position embedding (1, 1 + height * width, C) on a grid of that many patches."""
        side = self.image_size // self.patch_size
        if (height, width) == (side, side):
            return self.position_embedding
        return _resized(self.position_embedding, side, (height, width))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (T, C, h, w)
        tiles, _, height, width = patches.shape
        patches = patches.flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(tiles, 1, -1).to(patches.dtype)
        return torch.cat([class_token, patches], dim=1) + self.positions(height, width).to(patches.dtype)


def _resized(position_embedding: torch.Tensor, side: int, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic resize, in float32, of the patch rows (1, 1 + side * side, C) to `size`; the class row stays."""
    class_row, grid = position_embedding[:, :1], position_embedding[:, 1:]
    grid = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    return torch.cat([class_row, grid.flatten(2).transpose(1, 2).to(class_row.dtype)], dim=1)


class InternAttention(nn.Module):
    """Multi-head self-attention; with `qk_normalization` an RMS norm over all heads together."""

    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim, rest = divmod(config.hidden_size, self.num_heads)
        if rest:
            raise ValueError(f"hidden_size {config.hidden_size} is no multiple of num_attention_heads {self.num_heads}")
        self.use_flash_attn = config.use_flash_attn
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.attn_drop = nn.Dropout(config.attention_dropout)
        self.proj_drop = nn.Dropout(config.dropout)
        normed = config.qk_normalization
        self.q_norm = InternRMSNorm(config.hidden_size, config.layer_norm_eps) if normed else nn.Identity()
        self.k_norm = InternRMSNorm(config.hidden_size, config.layer_norm_eps) if normed else nn.Identity()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(hidden_states).chunk(3, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)) for x in (self.q_norm(q), self.k_norm(k), v))
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = attention(q, k, v, dropout, self.use_flash_attn).flatten(2)
        return self.proj_drop(self.proj(mixed))


class InternMLP(nn.Module):
    def __init__(self, config: InternVisionConfig):
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class _ScaleAndAdd(torch.autograd.Function):
    """x * scale for a frozen scale, which the backward pass finds without having torch keep it: where activations are
    computed again, that ends as soon as all that was kept is there, so that the product before this one is spared."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.scale = scale
        return x * scale

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        return gradient * ctx.scale, None


def scale_and_add(x: torch.Tensor, scale: nn.Parameter) -> torch.Tensor:
    """x (..., C) * scale (C,)."""
    return x * scale if scale.requires_grad or torch.compiler.is_compiling() else _ScaleAndAdd.apply(x, scale)


class InternVisionEncoderLayer(nn.Module):
    # As in the layers of transformers' language models: whether, and how, activations are computed again.
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
        x = x + self.drop_path1(scale_and_add(self.attn(self.norm1(x).to(x.dtype)), self.ls1))
        return x + self.drop_path2(scale_and_add(self.mlp(self.norm2(x).to(x.dtype)), self.ls2))


class InternVisionEncoder(nn.Module):
    def __init__(self, config: InternVisionConfig):
        super().__init__()
        last = max(config.num_hidden_layers - 1, 1)
        # Stochastic depth grows linearly; plain Python numbers, so that the model can be built on the meta device.
        rates = [config.drop_path_rate * layer / last for layer in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList([InternVisionEncoderLayer(config, rate) for rate in rates])

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether layers compute their activations again; setting it is for all of them."""
        return any(layer.gradient_checkpointing for layer in self.layers)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool):
        for layer in self.layers:
            layer.gradient_checkpointing = on

    def forward(self, inputs_embeds: torch.Tensor, output_hidden_states: bool = False) -> BaseModelOutput:
        """`hidden_states`, if asked for: the embeddings followed by the output of every layer."""
        x, states = inputs_embeds, [inputs_embeds]
        for layer in self.layers:
            # Frozen layers below the first that trains make no graph: there is nothing to compute again.
            if layer.gradient_checkpointing and self.training and (x.requires_grad or has_trainable_parameters(layer)):
                # Not reentrant: adapters get gradients although the input of a frozen encoder needs none.
                x = layer._gradient_checkpointing_func(layer, x, use_reentrant=False)
            else:
                x = layer(x)
            states.append(x)
        return BaseModelOutput(last_hidden_state=x, hidden_states=tuple(states) if output_hidden_states else None)


def has_trainable_parameters(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class InternVisionModel(PreTrainedModel):
    main_input_name = "pixel_values"
    config_class = InternVisionConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVisionEncoderLayer"]
    # What transformers 4 and 5 call the same ability.
    _supports_flash_attn_2 = _supports_flash_attn = _supports_sdpa = True

    def __init__(self, config: InternVisionConfig):
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        self.post_init()

    def _init_weights(self, module):
        """The constructors' own initial values stay."""

    def resize_pos_embeddings(self, old_size: int, new_size: int, patch_size: int):
        """Resizes the position embedding for good, from tiles of `old_size` pixels to `new_size`; not the config."""
        side, new_side = old_size // patch_size, new_size // patch_size
        resized = _resized(self.embeddings.position_embedding.detach(), side, (new_side, new_side))
        self.embeddings.position_embedding = nn.Parameter(resized)
        self.embeddings.image_size = new_size

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings module, on which PEFT hangs its `enable_input_require_grads` hook."""
        return self.embeddings

    def forward(self, pixel_values=None, output_hidden_states=None, return_dict=None, pixel_embeds=None):
        """Encodes tiles (T, 3, H, W), or their embeddings `pixel_embeds` (T, 1 + patches, C).

        Returns a BaseModelOutputWithPooling (a tuple if `return_dict=False`): `last_hidden_state` (T, 1 + patches, C)
        after the last block, without a norm; `pooler_output` its class token; `hidden_states` one more than blocks.
        """
        if pixel_values is None and pixel_embeds is None:
            raise ValueError("InternVisionModel needs pixel_values or pixel_embeds")
        if pixel_embeds is None:
            if pixel_values.ndim != 4:
                raise ValueError(f"pixel_values must be (tiles, 3, height, width), got {tuple(pixel_values.shape)}")
            pixel_embeds = self.embeddings(pixel_values)
            if self.training and not (pixel_values.requires_grad or has_trainable_parameters(self.embeddings)):
                # PEFT hangs a hook on frozen embeddings, for reentrant checkpoints: a graph that nobody needs here.
                pixel_embeds = pixel_embeds.detach()
        encoded = self.encoder(pixel_embeds, bool(output_hidden_states))
        output = BaseModelOutputWithPooling(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=encoded.last_hidden_state[:, 0],
            hidden_states=encoded.hidden_states,
        )
        return output if return_dict is not False else output.to_tuple()
