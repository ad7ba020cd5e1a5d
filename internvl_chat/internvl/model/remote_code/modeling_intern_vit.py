"""InternViT in a checkpoint's own code, for inference.

Shapes: T tiles, N = 1 + patches (a class token first), C hidden size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling

from internvl.model.remote_code.configuration_intern_vit import InternVisionConfig


class InternRMSNorm(nn.Module):
    """RMS norm, with statistics in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if hasattr(F, "rms_norm"):  # from torch 2.4 on
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.float() * scale).to(x.dtype)


NORMS = {"rms_norm": InternRMSNorm, "layer_norm": nn.LayerNorm}


class InternVisionEmbeddings(nn.Module):
    """Class token, embeddings of patches and of positions."""

    def __init__(self, config):
        super().__init__()
        self.patch_size, self.side = config.patch_size, config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, self.patch_size, self.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + self.side**2, config.hidden_size))

    def forward(self, pixel_values):
        height, width = (size // self.patch_size for size in pixel_values.shape[2:])
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        # The convolution, as a matrix product: (T, pixels of a patch, patches) -> (T, patches, C)
        patches = F.unfold(pixel_values.to(weight.dtype), self.patch_size, stride=self.patch_size)
        patches = F.linear(patches.transpose(1, 2).contiguous(), weight.flatten(1), bias)
        class_token = self.class_embedding.expand(len(patches), -1, -1)
        return torch.cat([class_token, patches], 1) + self.resize_positions(height, width)

    def resize_positions(self, height, width):
        """Return the position embeddings of a tile of height x width patches."""
        positions = self.position_embedding
        if (height, width) == (self.side, self.side):
            return positions
        grid = positions[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, size=(height, width), mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([positions[:, :1], grid.to(positions.dtype)], 1)


class InternAttention(nn.Module):
    """Multi-head self-attention; an optional norm spans all heads of queries or keys."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, size = config.num_attention_heads, config.hidden_size
        self.qkv, self.proj = nn.Linear(size, 3 * size, bias=config.qkv_bias), nn.Linear(size, size)
        self.q_norm, self.k_norm = (
            InternRMSNorm(size, config.layer_norm_eps) if config.qk_normalization else nn.Identity() for _ in "qk"
        )

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (T, N, C) each
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class InternMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config):
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class InternVisionEncoderLayer(nn.Module):
    """A pre-norm transformer block with layer scale."""

    def __init__(self, config):
        super().__init__()
        self.attn, self.mlp = InternAttention(config), InternMLP(config)
        self.norm1, self.norm2 = (NORMS[config.norm_type](config.hidden_size, eps=config.layer_norm_eps) for _ in "12")
        self.ls1, self.ls2 = (nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size)) for _ in "12")

    def forward(self, x):
        x = torch.addcmul(x, self.attn(self.norm1(x).to(x.dtype)), self.ls1)
        return torch.addcmul(x, self.mlp(self.norm2(x).to(x.dtype)), self.ls2)


class InternVisionEncoder(nn.Module):
    """All layers of InternViT."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([InternVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, x):
        """Return the embeddings and the output of each layer."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class InternVisionModel(PreTrainedModel):
    """InternViT: embeddings and layers, without a final norm."""

    config_class = InternVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["InternVisionEncoderLayer"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embeddings, self.encoder = InternVisionEmbeddings(config), InternVisionEncoder(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, pixel_values, output_hidden_states=None, return_dict=None):
        """Encode tiles (T, 3, height, width)."""
        states = self.encoder(self.embeddings(pixel_values))
        hidden_states = states if output_hidden_states else None
        output = BaseModelOutputWithPooling(states[-1], states[-1][:, 0], hidden_states=hidden_states)
        return output if return_dict is not False else output.to_tuple()
